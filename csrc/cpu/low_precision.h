// Tensors of 16 bits on a CPU: blocks of them are widened to float32 in the first-level cache, go
// through the loops for float32, and are rounded when they are stored. One more type of tensor thus
// costs no other loop, and its arithmetic is the same.
#pragma once

#include <cstring>

#include "../math.h"
#include "isa.h"
#include "loops.h"

namespace wsam_fused {

enum class Low { kBFloat16, kHalf };

// Elements that are widened at once: seven operands of a block stay in the first-level cache. A
// multiple of the 32 elements of a word of noise.
constexpr int64_t kBlock = 512;

WSAM_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <Low kind>
WSAM_HOST_DEVICE float widened(uint16_t stored) {
  const uint32_t bits = stored;
  if constexpr (kind == Low::kBFloat16) return float_of(bits << 16);
  const uint32_t sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  // float16 has 5 bits of exponent with a bias of 15, float32 has 8 with 127.
  const uint32_t normal = (size << 13) + (size >= 0x7c00u ? 224u << 23 : 112u << 23);
  const uint32_t tiny = bits_of(float(int32_t(size)) * 0x1p-24f);  // no leading one
  return float_of(sign | (size < 0x0400u ? tiny : normal));
}

// Rounded to nearest, ties to even.
template <Low kind>
WSAM_HOST_DEVICE uint16_t narrowed(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  if constexpr (kind == Low::kBFloat16) {
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return uint16_t((size > 0x7f800000u ? bits | 0x00400000u : rounded) >> 16);
  }
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (size - (112u << 23) + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24, that of float32 just above 1/2.
  const uint32_t tiny = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = size < (113u << 23) ? tiny : normal;
  const uint32_t beyond = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (size >= 0x477ff000u ? beyond : finite));
}

struct WidenArgs {
  const uint16_t* from;
  float* to;
  int64_t count;
};

template <Low kind>
struct WidenLoop {
  using Args = WidenArgs;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    const uint16_t* const from = args.from;
    float* const to = args.to;
    const int64_t count = args.count;
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) to[i] = widened<kind>(from[i]);
  }
};

struct NarrowArgs {
  const float* from;
  uint16_t* to;
  int64_t count;
  uint32_t chance, operand, first;  // see chance_at()
};

template <Low kind, bool by_chance>
struct NarrowLoop {
  using Args = NarrowArgs;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    const float* const from = args.from;
    uint16_t* const to = args.to;
    const int64_t count = args.count;
    const uint32_t of_tensor = args.chance, operand = args.operand, first = args.first;
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (by_chance) {
        const uint32_t chance = chance_at(of_tensor, operand, first + uint32_t(i));
        to[i] = rounded_by_chance(bits_of(from[i]), chance);
      } else {
        to[i] = narrowed<kind>(from[i]);
      }
    }
  }
};

// The conversions of one dtype, compiled for the instruction set of this machine.
template <Low kind>
struct Conversions {
  decltype(CompiledLoop<WidenLoop<kind>>::choose()) widen_loop =
      CompiledLoop<WidenLoop<kind>>::choose();
  decltype(CompiledLoop<NarrowLoop<kind, false>>::choose()) narrow_loop =
      CompiledLoop<NarrowLoop<kind, false>>::choose();

  void widen(const uint16_t* from, float* to, int64_t count) const {
    widen_loop({from, to, count});
  }
  void narrow(const float* from, uint16_t* to, int64_t count) const {
    narrow_loop({from, to, count, 0, 0, 0});
  }
};

// Calls visit(first, count) for every block of a segment of `total` elements.
template <typename Visit>
void for_each_block(int64_t total, const Visit& visit) {
  for (int64_t first = 0; first < total; first += kBlock) {
    visit(first, smaller(kBlock, total - first));
  }
}

// Calls body with the kind of a 16-bit dtype.
template <typename Body>
void with_low(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::BFloat16) {
    body(std::integral_constant<Low, Low::kBFloat16>{});
  } else {
    body(std::integral_constant<Low, Low::kHalf>{});
  }
}

inline bool is_low(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

}  // namespace wsam_fused
