// reduce on a GPU: what cpu/reduce.cpp states, over gradients of the same or a lower precision.
//
//   1. Every thread sums its share of a chunk, in float64.
//   2. The block adds its threads' sums as a tree: one partial sum per chunk.
//   3. The block that is last adds the partial sums: thread by thread in a fixed order, then as a
//      tree. Nothing depends on how many blocks there are or when they run.
#pragma once

#include "../math.h"
#include "vector.h"
#include "window.h"

namespace wsam_fused {

struct Sums {
  double first, plain_sq;

  WSAM_HOST_DEVICE Sums& operator+=(const Sums& other) {
    first += other.first;
    plain_sq += other.plain_sq;
    return *this;
  }
};

// What the first of the two sums is of: g^2, M(w, g) g^2 or g1 g.
enum class Pairing { kNone, kAdaptive, kFisher, kWithFirst };

// P is the type of w (float32 for parameters of 16 bits that have such weights) or g1, where they
// are read; else that of g.
template <typename P, typename G, Pairing pairing>
struct Reduce {
  using T = typename ComputeType<P>::type;
  static constexpr bool kReadsOther =
      pairing == Pairing::kAdaptive || pairing == Pairing::kWithFirst;
  static constexpr int kWidth = vector_width(sizeof(P) > sizeof(G) ? sizeof(P) : sizeof(G));
  static constexpr int kBlocksPerProcessor = 4;

  struct Slot {
    Place place;
    const G* g;
    const P* other;  // w or g1, if it is read
    double eta;
    bool aligned;
  };

  Plan plan;
  const double* groups;
  double* partials;  // 2 per chunk
  double* scalars;
  double* flags;
  TableRow gradient;
  TableRow other;  // where w or g1 is
  bool accumulate;

  WSAM_HOST_DEVICE void fill(Slot& slot, int64_t chunk, int64_t tensor) const {
    slot.place = place_of(plan, chunk, tensor);
    slot.g = start<const G>(plan, gradient, tensor, slot.place);
    constexpr int64_t kGeometry = pairing == Pairing::kFisher ? kFisher : kAdaptive;
    slot.other = kReadsOther ? start<const P>(plan, other, tensor, slot.place) : nullptr;
    slot.eta = scaled_eta(kGeometry, scalars, groups + plan.at(kGroup, tensor) * kGroupColumns);
    slot.aligned = is_aligned<kWidth>(slot.g) && is_aligned<kWidth>(slot.other);
  }

  WSAM_HOST_DEVICE void work(const Window& window, const Slot* slots, int thread,
                             Sums& sums) const {
    for_each_share<kWidth>(window, slots, thread,
                           [&](const Slot& slot, int begin, int end, int stride) {
                             if (slot.g && (slot.other || !kReadsOther))
                               add(slot, begin, end, stride, sums);
                           });
  }

  WSAM_HOST_DEVICE void add(const Slot& slot, int begin, int end, int stride, Sums& sums) const {
    const G* const g = slot.g;
    const P* const other = slot.other;
    const double eta = slot.eta;
    const bool aligned = slot.aligned;
    int i = begin;
    if constexpr (!kReadsOther) {
      // Two vectors at once: more of the memory's latency is hidden than by one. With another
      // operand both do that.
      for (; aligned && i + stride + kWidth <= end; i += 2 * stride) {
        T near[kWidth], far[kWidth];
        load(g, Piece<kWidth>{i}, near);
        load(g, Piece<kWidth>{i + stride}, far);
        add_products(near, near, eta, sums);
        add_products(far, far, eta, sums);
      }
    }
    for (; i < end; i += stride) {
      for_each_piece<kWidth>(i, end, aligned, [&](auto piece) {
        T x[piece.width], y[piece.width] = {};
        load(g, piece, x);
        if constexpr (kReadsOther) load(other, piece, y);
        add_products(x, y, eta, sums);
      });
    }
  }

  template <int width>
  static WSAM_HOST_DEVICE void add_products(const T (&g)[width], const T (&other)[width],
                                            double eta, Sums& sums) {
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) {
      const double x = double(g[k]), y = double(other[k]);
      sums.plain_sq = fused_multiply_add(x, x, sums.plain_sq);
      if constexpr (pairing == Pairing::kWithFirst) {
        sums.first = fused_multiply_add(y, x, sums.first);
      } else if constexpr (pairing == Pairing::kAdaptive) {
        sums.first = fused_multiply_add(metric<kAdaptive>(y, x, eta) * x, x, sums.first);
      } else if constexpr (pairing == Pairing::kFisher) {
        sums.first = fused_multiply_add(metric<kFisher>(y, x, eta) * x, x, sums.first);
      }
    }
  }

  WSAM_HOST_DEVICE void store_partial(int64_t chunk, const Sums& sums) const {
    partials[2 * chunk] = pairing == Pairing::kNone ? sums.plain_sq : sums.first;
    partials[2 * chunk + 1] = sums.plain_sq;
  }

  // A thread's part of the sum over chunks.
  WSAM_HOST_DEVICE Sums sum_of_partials(int thread) const {
    constexpr int kAtOnce = 4;  // loads that do not wait for each other
    Sums sums{0, 0};
    for (int64_t first = thread; first < plan.chunks; first += kAtOnce * kThreads) {
      Sums parts[kAtOnce];
      WSAM_UNROLL
      for (int k = 0; k < kAtOnce; ++k) parts[k] = partial(first + k * kThreads);
      WSAM_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sums += parts[k];
    }
    return sums;
  }

  WSAM_HOST_DEVICE void store_total(const Sums& sums) const {
    if (gradient == kGrad1) put(kMetricSq, sums.first);
    if constexpr (pairing == Pairing::kWithFirst) put(kDot12, sums.first);
    put(kGrad1Sq + gradient - kGrad1, sums.plain_sq);
  }

 private:
  WSAM_HOST_DEVICE void put(int slot, double sum) const {
    scalars[slot] = accumulate ? scalars[slot] + sum : sum;
  }

  WSAM_HOST_DEVICE Sums partial(int64_t chunk) const {
    if (chunk >= plan.chunks) return {0, 0};
    const double* const pair = partials + 2 * chunk;
#if defined(__CUDA_ARCH__)
    // What another block has written: not from this multiprocessor's cache.
    return {__ldcg(pair), __ldcg(pair + 1)};
#else
    return {pair[0], pair[1]};
#endif
  }
};

}  // namespace wsam_fused
