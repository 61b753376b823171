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
  double metric_sq, plain_sq;

  WSAM_HOST_DEVICE Sums& operator+=(const Sums& other) {
    metric_sq += other.metric_sq;
    plain_sq += other.plain_sq;
    return *this;
  }
};

template <typename P, typename G, Geometry geometry>
struct Reduce {
  using T = typename ComputeType<P>::type;
  static constexpr int kWidth =
      vector_width(geometry == kAdaptive && sizeof(P) > sizeof(G) ? sizeof(P) : sizeof(G));
  static constexpr int kBlocksPerProcessor = 4;

  struct Slot {
    Place place;
    const G* g;
    const P* w;
    bool aligned;
  };

  Plan plan;
  double* partials;  // 2 per chunk
  double* scalars;
  double* flags;
  TableRow gradient;
  bool accumulate;

  WSAM_HOST_DEVICE void fill(Slot& slot, int64_t chunk, int64_t tensor) const {
    slot.place = place_of(plan, chunk, tensor);
    slot.g = start<const G>(plan, gradient, tensor, slot.place);
    slot.w = start<const P>(plan, kParam, tensor, slot.place);
    slot.aligned =
        is_aligned<kWidth>(slot.g) && (geometry != kAdaptive || is_aligned<kWidth>(slot.w));
  }

  WSAM_HOST_DEVICE void work(const Window& window, const Slot* slots, int thread,
                             Sums& sums) const {
    for_each_share<kWidth>(window, slots, thread,
                           [&](const Slot& slot, int begin, int end, int stride) {
                             if (slot.g) add(slot, begin, end, stride, sums);
                           });
  }

  WSAM_HOST_DEVICE void add(const Slot& slot, int begin, int end, int stride, Sums& sums) const {
    const G* const g = slot.g;
    const P* const w = slot.w;
    const bool aligned = slot.aligned;
    int i = begin;
    if constexpr (geometry == kEuclidean) {
      // Two vectors at once: more of the memory's latency is hidden than by one. With the metric
      // two operands do that.
      for (; aligned && i + stride + kWidth <= end; i += 2 * stride) {
        T near[kWidth], far[kWidth];
        load(g, Piece<kWidth>{i}, near);
        load(g, Piece<kWidth>{i + stride}, far);
        add_squares(near, near, sums);
        add_squares(far, far, sums);
      }
    }
    for (; i < end; i += stride) {
      for_each_piece<kWidth>(i, end, aligned, [&](auto piece) {
        T x[piece.width], at[piece.width];
        load(g, piece, x);
        if constexpr (geometry == kAdaptive) load(w, piece, at);
        add_squares(x, at, sums);
      });
    }
  }

  template <int width>
  static WSAM_HOST_DEVICE void add_squares(const T (&g)[width], const T (&w)[width], Sums& sums) {
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) {
      const double x = double(g[k]);
      sums.plain_sq = fused_multiply_add(x, x, sums.plain_sq);
      if constexpr (geometry == kAdaptive) {
        const double m = metric<geometry>(double(w[k]));
        sums.metric_sq = fused_multiply_add(m * x, x, sums.metric_sq);
      }
    }
  }

  WSAM_HOST_DEVICE void store_partial(int64_t chunk, const Sums& sums) const {
    partials[2 * chunk] = geometry == kEuclidean ? sums.plain_sq : sums.metric_sq;
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
    if (gradient == kGrad1) put(kMetricSq, sums.metric_sq);
    put(gradient == kGrad1 ? kGrad1Sq : kGrad2Sq, sums.plain_sq);
  }

 private:
  WSAM_HOST_DEVICE void put(ScalarSlot slot, double sum) const {
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
