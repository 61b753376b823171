// Copies that do not read their destination.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace wsam_fused {

// From so many bytes on a copy of w does not stay in the cache until it is read: a choice, not
// tuned.
constexpr int64_t kStreamedBytes = int64_t(32) << 20;

// Copies to memory that is read only much later. An ordinary store reads the line that it writes
// to; one past the cache does not.
template <typename T>
void stream_copy(T* to, const T* from, int64_t count) {
  int64_t i = 0;
#if defined(__SSE2__)
  constexpr int64_t kPerStore = sizeof(__m128i) / sizeof(T);
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0) {
    for (; i + kPerStore <= count; i += kPerStore) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), values);
    }
    _mm_sfence();  // other threads may read it
  }
#endif
  for (; i < count; ++i) to[i] = from[i];
}

}  // namespace wsam_fused
