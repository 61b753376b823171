// perturb_: p <- fma(s, M(w) g1, w) with s = sign * rho / (norm + eps), or the way back.
//
// operand  row      access
// p        kParam   read and written
// g1       kGrad1   read           a tensor whose address is 0 is left alone
// backup   kBackup  only with has_backup, else w is recomputed as fma(-s, g1, p); written, and
//                   read on the way back. May be g1's own memory where the method does not need g1
//                   any more.
//
// Moves 3 elements per parameter, 4 with a backup. A norm that is not finite leaves the list alone.
// flags[kPerturbed] says afterwards what is in p; the way back does nothing where it is 0.
#include <torch/csrc/stable/library.h>

#include "restore.h"

namespace wsam_fused {
namespace {

template <typename T, Geometry geometry, bool keep_backup>
struct PerturbLoop {
  using Args = PerturbArgs<T>;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    T* const p = args.p;
    const T* const g1 = args.g1;
    T* const backup = args.backup;
    const int64_t count = args.count;
    const T scale = args.scale;
    const auto element = [=](int64_t i) __attribute__((always_inline)) {
      const T w = p[i];
      p[i] = perturbed<geometry>(w, g1[i], scale);
      if constexpr (keep_backup) backup[i] = w;
    };
    // Two places at once: more of the memory's latency is hidden than by one.
    const int64_t half = count / 2;
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < half; ++i) {
      element(i);
      element(half + i);
    }
    if (count % 2) element(count - 1);
  }
};

template <typename T>
auto chosen_loop(int64_t geometry, bool undo, bool has_backup) {
  if (undo) return chosen_restore_loop<T>(has_backup);
  if (geometry == kAdaptive) return CompiledLoop<PerturbLoop<T, kAdaptive, true>>::choose();
  return has_backup ? CompiledLoop<PerturbLoop<T, kEuclidean, true>>::choose()
                    : CompiledLoop<PerturbLoop<T, kEuclidean, false>>::choose();
}

template <typename T>
void perturb_list(const Plan& plan, const double* groups, double metric_sq, int64_t geometry,
                  bool undo, bool has_backup) {
  const auto loop = chosen_loop<T>(geometry, undo, has_backup);
  for_each_chunk(plan, [&](int64_t chunk) {
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      const T* g1 = segment<T>(plan, kGrad1, tensor, begin);
      if (!g1) return;
      const double* group = groups + plan.at(kGroup, tensor) * kGroupColumns;
      T* backup = has_backup ? segment<T>(plan, kBackup, tensor, begin) : nullptr;
      loop({segment<T>(plan, kParam, tensor, begin), g1, backup, end - begin,
            ascent_scale<T>(metric_sq, group)});
    });
  });
}

void perturb(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
             ScalarType grad_dtype, Tensor groups, Tensor scalars, Tensor flags, int64_t geometry,
             bool has_backup, bool undo) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  const double metric_sq = checked_doubles(scalars, "scalars", kScalarSlots)[kMetricSq];
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_geometry(geometry, has_backup);
  if (undo != (flag[kPerturbed] != 0) || !is_finite(metric_sq)) return;
  with_dtype(dtype, grad_dtype, [&](auto zero) {
    perturb_list<decltype(zero)>(plan, group_rows, metric_sq, geometry, undo, has_backup);
  });
  flag[kPerturbed] = undo ? 0.0 : 1.0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) {
  library.impl("perturb_", TORCH_BOX(&perturb));
}

}  // namespace wsam_fused
