// reduce: two sums over one gradient list, in float64, into the scalars.
//
//   first gradient    scalars[kMetricSq] = sum M(w, g) g^2,   scalars[kGrad1Sq] = sum g^2
//   others            scalars[kDot12] = sum g1 g (with_first), scalars[kGrad2Sq or 3] = sum g^2
//
// or += for further lists (accumulate).
//
// operand   row               access
// gradient  kGrad1..kGrad3    read     a tensor whose address is 0 is left out
// w         kParam            read     only for the adaptive geometry; with has_master in kBackup
// g1        kGrad1            read     only with_first; likewise
//
// Moves 1 element per parameter, 2 for the adaptive geometry or with_first. Deterministic for any
// number of threads: a fixed number of lanes per segment, one pair of partial sums per chunk, added
// in the order of the chunks.
#include <torch/csrc/stable/library.h>

#include "../math.h"
#include "check_table.h"
#include "low_precision.h"

namespace wsam_fused {
namespace {

struct Sums {
  double first = 0, plain_sq = 0;
};

// What the first of the two sums is of.
enum class Pairing { kNone, kAdaptive, kFisher, kWithFirst };

template <typename T, Pairing pairing>
struct ReduceLoop {
  struct Args {
    const T* g;
    const T* other;  // w or g1
    int64_t count;
    double eta;
    Sums* sums;
  };

  // Four places at once: more of the memory's latency is hidden than by one.
  static WSAM_HOST_DEVICE void run(const Args& args) {
    constexpr int kStreams = 4, kWidth = 8, kLanes = kStreams * kWidth;
    const T* const g = args.g;
    const T* const other = args.other;
    const double eta = args.eta;
    double first[kLanes] = {}, plain_sq[kLanes] = {};
    const int64_t stretch = args.count / kLanes * kWidth;
    for (int64_t i = 0; i < stretch; i += kWidth) {
      for (int stream = 0; stream < kStreams; ++stream) {
        for (int lane = 0; lane < kWidth; ++lane) {
          const int64_t k = stream * stretch + i + lane;
          const int sum = stream * kWidth + lane;
          add(g[k], kReadsOther ? other[k] : T(1), eta, first[sum], plain_sq[sum]);
        }
      }
    }
    const int64_t whole = kStreams * stretch;
    for (int64_t i = whole; i < args.count; ++i) {
      add(g[i], kReadsOther ? other[i] : T(1), eta, first[i - whole], plain_sq[i - whole]);
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        first[lane] += first[lane + half];
        plain_sq[lane] += plain_sq[lane + half];
      }
    }
    args.sums->plain_sq += plain_sq[0];
    args.sums->first += pairing == Pairing::kNone ? plain_sq[0] : first[0];
  }

 private:
  static constexpr bool kReadsOther =
      pairing == Pairing::kAdaptive || pairing == Pairing::kWithFirst;

  static WSAM_HOST_DEVICE void add(T g, T other, double eta, double& first, double& plain_sq) {
    const double x = double(g), y = double(other);
    plain_sq = fused_multiply_add(x, x, plain_sq);
    if constexpr (pairing == Pairing::kWithFirst) {
      first = fused_multiply_add(y, x, first);
    } else if constexpr (pairing == Pairing::kAdaptive) {
      first = fused_multiply_add(metric<kAdaptive>(y, x, eta) * x, x, first);
    } else if constexpr (pairing == Pairing::kFisher) {
      first = fused_multiply_add(metric<kFisher>(y, x, eta) * x, x, first);
    }
  }
};

// What is the same for all segments of one reduction.
struct Reduction {
  const double* groups;
  const double* scalars;
  TableRow gradient;
  bool has_master;
  double* partials;
};

// Calls add(sums, g, other, count, eta) for every segment; `other` is in row `second`.
template <Pairing pairing, typename Storage, typename Other, typename Add>
void for_each_summand(const Plan& plan, const Reduction& reduction, TableRow second,
                      const Add& add) {
  constexpr int64_t kGeometry = pairing == Pairing::kFisher ? kFisher : kAdaptive;
  for_each_chunk(plan, [&](int64_t chunk) {
    Sums sums;
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      const Storage* const g = segment<Storage>(plan, reduction.gradient, tensor, begin);
      const Other* const other = segment<Other>(plan, second, tensor, begin);
      const double* const group = reduction.groups + plan.at(kGroup, tensor) * kGroupColumns;
      const double eta = scaled_eta(kGeometry, reduction.scalars, group);
      if (g && other) add(&sums, g, other, end - begin, eta);
    });
    reduction.partials[2 * chunk] = sums.first;
    reduction.partials[2 * chunk + 1] = sums.plain_sq;
  });
}

template <typename T, Pairing pairing>
void reduce_list(const Plan& plan, const Reduction& reduction) {
  const auto loop = CompiledLoop<ReduceLoop<T, pairing>>::choose();
  for_each_summand<pairing, T, T>(plan, reduction, pairing == Pairing::kWithFirst ? kGrad1 : kParam,
                                  [&](Sums* sums, const T* g, const T* other, int64_t count,
                                      double eta) { loop({g, other, count, eta, sums}); });
}

template <Low kind, Pairing pairing>
void reduce_low_list(const Plan& plan, const Reduction& reduction) {
  const auto loop = CompiledLoop<ReduceLoop<float, pairing>>::choose();
  const Conversions<kind> convert;
  if (pairing == Pairing::kAdaptive && reduction.has_master) {
    for_each_summand<pairing, uint16_t, float>(
        plan, reduction, kBackup,
        [&](Sums* sums, const uint16_t* g, const float* w, int64_t total, double eta) {
          for_each_block(total, [&](int64_t first, int64_t count) {
            float wide_g[kBlock];
            convert.widen(g + first, wide_g, count);
            loop({wide_g, w + first, count, eta, sums});
          });
        });
    return;
  }
  constexpr bool kReadsOther = pairing == Pairing::kAdaptive || pairing == Pairing::kWithFirst;
  for_each_summand<pairing, uint16_t, uint16_t>(
      plan, reduction, pairing == Pairing::kWithFirst ? kGrad1 : kParam,
      [&](Sums* sums, const uint16_t* g, const uint16_t* other, int64_t total, double eta) {
        for_each_block(total, [&](int64_t first, int64_t count) {
          float wide_g[kBlock], wide_other[kBlock];
          convert.widen(g + first, wide_g, count);
          if (kReadsOther) convert.widen(other + first, wide_other, count);
          loop({wide_g, kReadsOther ? wide_other : wide_g, count, eta, sums});
        });
      });
}

Pairing pairing_of(int64_t gradient, int64_t geometry, bool with_first) {
  if (gradient != kGrad1) return with_first ? Pairing::kWithFirst : Pairing::kNone;
  if (geometry == kAdaptive) return Pairing::kAdaptive;
  return geometry == kFisher ? Pairing::kFisher : Pairing::kNone;
}

// Calls body with a compile-time constant for the pairing.
template <typename Body>
void with_pairing(Pairing pairing, const Body& body) {
  switch (pairing) {
    case Pairing::kAdaptive:
      return body(std::integral_constant<Pairing, Pairing::kAdaptive>{});
    case Pairing::kFisher:
      return body(std::integral_constant<Pairing, Pairing::kFisher>{});
    case Pairing::kWithFirst:
      return body(std::integral_constant<Pairing, Pairing::kWithFirst>{});
    case Pairing::kNone:
      return body(std::integral_constant<Pairing, Pairing::kNone>{});
  }
}

void reduce(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, Tensor groups, Tensor partials, Tensor scalars, Tensor flags,
            int64_t gradient, int64_t geometry, bool with_first, bool accumulate, bool has_master) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  check_gradient(gradient);
  check_metric(geometry);
  double* const partial = checked_doubles(partials, "partials", 2 * plan.chunks);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  checked_doubles(flags, "flags", kFlags);  // which a GPU counts its blocks with
  check_apart({&partials, &scalars, &flags}, {&table, &chunks, &groups});
  const Pairing pairing = pairing_of(gradient, geometry, with_first);
  check_precision(dtype, has_master, has_master, false);
  const Reduction reduction{group_rows, scalar, TableRow(gradient), has_master, partial};
  check_grad_dtype(dtype, grad_dtype);
  check_table(plan, groups.size(0), [&](int64_t tensor) {
    const bool reads_master = has_master && pairing == Pairing::kAdaptive;
    if (reads_master && plan.at(kGrad1, tensor)) check_address(plan, kBackup, "backup", tensor);
  });
  with_pairing(pairing, [&](auto constant) {
    if (is_low(dtype)) {
      with_low(dtype, [&](auto kind) { reduce_low_list<kind(), constant()>(plan, reduction); });
    } else {
      with_dtype(dtype,
                 [&](auto zero) { reduce_list<decltype(zero), constant()>(plan, reduction); });
    }
  });
  Sums total;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    total.first += partial[2 * chunk];
    total.plain_sq += partial[2 * chunk + 1];
  }
  const auto store = [&](int slot, double sum) {
    scalar[slot] = accumulate ? scalar[slot] + sum : sum;
  };
  if (gradient == kGrad1) store(kMetricSq, total.first);
  if (pairing == Pairing::kWithFirst) store(kDot12, total.first);
  store(kGrad1Sq + int(gradient) - kGrad1, total.plain_sq);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) { library.impl("reduce", TORCH_BOX(&reduce)); }

}  // namespace wsam_fused
