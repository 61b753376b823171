// reduce: sums of squares of one gradient list, in float64, into the scalars.
//
//   scalars[kMetricSq] = sum M(w) g^2     only for the first gradient
//   scalars[kGrad1Sq or kGrad2Sq] = sum g^2
//
// or += for further lists (accumulate).
//
// operand   row               access
// gradient  kGrad1 or kGrad2  read     a tensor whose address is 0 is left out
// w         kParam            read     only for the adaptive geometry
//
// Moves 1 element per parameter (2 for the adaptive geometry). Deterministic for any number of
// threads: a fixed number of lanes per segment, one partial sum per chunk, added in the order of
// the chunks.
#include <torch/csrc/stable/library.h>

#include "../math.h"
#include "loops.h"

namespace wsam_fused {
namespace {

struct Sums {
  double metric_sq = 0, plain_sq = 0;
};

template <typename T, Geometry geometry>
struct ReduceLoop {
  struct Args {
    const T* g;
    const T* w;
    int64_t count;
    Sums* sums;
  };

  // Four places at once: more of the memory's latency is hidden than by one.
  static WSAM_HOST_DEVICE void run(const Args& args) {
    constexpr int kStreams = 4, kWidth = 8, kLanes = kStreams * kWidth;
    const T* const g = args.g;
    const T* const w = args.w;
    double metric_sq[kLanes] = {}, plain_sq[kLanes] = {};
    const int64_t stretch = args.count / kLanes * kWidth;
    for (int64_t i = 0; i < stretch; i += kWidth) {
      for (int stream = 0; stream < kStreams; ++stream) {
        for (int lane = 0; lane < kWidth; ++lane) {
          const int64_t k = stream * stretch + i + lane;
          const int sum = stream * kWidth + lane;
          add<geometry>(g[k], geometry == kEuclidean ? T(1) : w[k], metric_sq[sum], plain_sq[sum]);
        }
      }
    }
    const int64_t whole = kStreams * stretch;
    for (int64_t i = whole; i < args.count; ++i) {
      add<geometry>(g[i], geometry == kEuclidean ? T(1) : w[i], metric_sq[i - whole],
                    plain_sq[i - whole]);
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        metric_sq[lane] += metric_sq[lane + half];
        plain_sq[lane] += plain_sq[lane + half];
      }
    }
    args.sums->plain_sq += plain_sq[0];
    args.sums->metric_sq += geometry == kEuclidean ? plain_sq[0] : metric_sq[0];
  }

  template <Geometry>
  static WSAM_HOST_DEVICE void add(T g, T w, double& metric_sq, double& plain_sq) {
    const double x = double(g);
    plain_sq = fused_multiply_add(x, x, plain_sq);
    if constexpr (geometry != kEuclidean) {
      metric_sq = fused_multiply_add(metric<geometry>(double(w)) * x, x, metric_sq);
    }
  }
};

template <typename T, Geometry geometry>
void reduce_list(const Plan& plan, TableRow gradient, double* partials) {
  using Loop = ReduceLoop<T, geometry>;
  const auto loop = CompiledLoop<Loop>::choose();
  for_each_chunk(plan, [&](int64_t chunk) {
    Sums sums;
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      const T* g = segment<T>(plan, gradient, tensor, begin);
      if (!g) return;
      loop({g, segment<T>(plan, kParam, tensor, begin), end - begin, &sums});
    });
    partials[2 * chunk] = sums.metric_sq;
    partials[2 * chunk + 1] = sums.plain_sq;
  });
}

void reduce(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, Tensor partials, Tensor scalars, Tensor /* flags */,
            int64_t gradient, int64_t geometry, bool accumulate) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  check_gradient(gradient);
  double* const partial = checked_doubles(partials, "partials", 2 * plan.chunks);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  with_dtype(dtype, grad_dtype, [&](auto zero) {
    using T = decltype(zero);
    if (geometry == kAdaptive && gradient == kGrad1) {
      reduce_list<T, kAdaptive>(plan, kGrad1, partial);
    } else {
      reduce_list<T, kEuclidean>(plan, TableRow(gradient), partial);
    }
  });
  Sums total;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    total.metric_sq += partial[2 * chunk];
    total.plain_sq += partial[2 * chunk + 1];
  }
  const auto store = [&](ScalarSlot slot, double sum) {
    scalar[slot] = accumulate ? scalar[slot] + sum : sum;
  };
  if (gradient == kGrad1) store(kMetricSq, total.metric_sq);
  store(gradient == kGrad1 ? kGrad1Sq : kGrad2Sq, total.plain_sq);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) { library.impl("reduce", TORCH_BOX(&reduce)); }

}  // namespace wsam_fused
