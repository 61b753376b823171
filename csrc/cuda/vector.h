// Memory access of a GPU thread: vectors of at most 16 bytes, converted to the type that is
// computed in. A vector that is ragged, or one of whose operands is not aligned, moves element by
// element. Which of both is decided once for all operands: with a branch in each load, those of low
// precision are converted before the next one is asked for, one memory latency after the other
// (seen in the machine code).
//
// No head is split off to reach alignment: the states are allocations of their own and begin
// aligned, so that a parameter which does not can never share a head with them. Elements move one
// by one only where an address or a tensor's last vector asks for it; the neighbours' share of each
// memory sector comes from the cache.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../plan.h"

namespace wsam_fused {

template <typename Storage>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

constexpr int kVectorBytes = 16;

// Elements that a thread moves at once when the widest of its operands has elements of this size.
constexpr int vector_width(size_t widest) { return int(kVectorBytes / widest); }

template <typename Storage, int width>
struct alignas(sizeof(Storage) * width) Packed {
  Storage values[width];
};

template <int width, typename Storage>
WSAM_HOST_DEVICE bool is_aligned(const Storage* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Packed<Storage, width>) == 0;
}

// What one thread handles at once: `width` elements from `begin`, at an aligned address.
template <int elements>
struct Piece {
  static constexpr int width = elements;
  int begin;
};

// Calls body with the `width` elements from `begin` as one piece, or with every one of them that is
// before `end` where they are fewer or not aligned.
template <int width, typename Body>
WSAM_HOST_DEVICE void for_each_piece(int begin, int end, bool aligned, const Body& body) {
  if (aligned && begin + width <= end) return body(Piece<width>{begin});
  const int last = smaller(begin + width, end);
  WSAM_NO_UNROLL
  for (int i = begin; i < last; ++i) body(Piece<1>{i});
}

// Addresses come out of a table, and the compiler cannot see that they are global memory.
template <typename Storage>
WSAM_HOST_DEVICE Storage* in_global_memory(Storage* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

template <typename Storage, int width, typename T>
WSAM_HOST_DEVICE void load(const Storage* tensor, const Piece<width>& piece, T (&values)[width]) {
  const Storage* const from = in_global_memory(tensor + piece.begin);
  const auto packed = *reinterpret_cast<const Packed<Storage, width>*>(from);
  WSAM_UNROLL
  for (int k = 0; k < width; ++k) values[k] = static_cast<T>(packed.values[k]);
}

// The compiler moves no load that follows to before this place, where registers would have to wait
// for it.
WSAM_HOST_DEVICE void hold_back_loads() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// In assembly, because nvcc takes an assigned struct apart (seen in what it made of it).
template <typename Storage, int width>
WSAM_HOST_DEVICE void store_packed(Storage* to, const Packed<Storage, width>& packed) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(packed) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(&packed);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(packed) == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(&packed);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits.x), "r"(bits.y)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Packed<Storage, width>*>(to) = packed;
}

template <typename Storage, int width, typename T>
WSAM_HOST_DEVICE void store(Storage* tensor, const Piece<width>& piece, const T (&values)[width]) {
  Storage* const to = in_global_memory(tensor + piece.begin);
  Packed<Storage, width> packed;
  WSAM_UNROLL
  for (int k = 0; k < width; ++k) packed.values[k] = static_cast<Storage>(values[k]);
  store_packed(to, packed);
}

}  // namespace wsam_fused
