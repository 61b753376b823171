// The operations of the library wsam_fused, all of them, with their contracts.
//
// They read a plan (plan.h): addresses, not tensors, so the schemas cannot say what is written
// through them. They are private for that reason; wsam_fused/backends/native.py is their caller.
// The element type of parameters, gradients and states is `dtype`.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

namespace wsam_fused {
namespace {

// The constants of plan.h in the order that wsam_fused/plan.py checks them against its own.
std::vector<int64_t> layout() {
  return {kTableRows, kGroupColumns, kScalarSlots, kFlags, kAlignment};
}

Isa supported_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa requested_isa() {
  const char* const value = std::getenv("WSAM_FUSED_CPU_ISA");
  const std::string name = value ? value : "";
  const Isa best = supported_isa();
  const Isa wanted = name == "baseline" ? Isa::kBaseline
                     : name == "avx2"   ? Isa::kAvx2
                     : name == "avx512" ? Isa::kAvx512
                                        : best;
  return wanted < best ? wanted : best;
}

int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

}  // namespace

Isa active_isa() {
  static const Isa isa = requested_isa();
  return isa;
}

STABLE_TORCH_LIBRARY(wsam_fused, library) {
  // Adds the sums of squares of the gradient list in row `gradient` to `scalars`; `partials` is
  // scratch, 2 float64 per chunk.
  library.def(
      "reduce(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, int gradient, "
      "int geometry, Tensor(a!) partials, Tensor(b!) scalars) -> ()");
  // Perturbs the parameters, or with undo=True takes them back.
  library.def(
      "perturb_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, Tensor groups, "
      "Tensor scalars, Tensor(a!) flags, int geometry, bool has_backup, bool undo, float eps) "
      "-> ()");
  // Restores, updates parameters and states, counts the steps.
  library.def(
      "update_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, Tensor groups, "
      "Tensor(a!) scalars, Tensor(b!) flags, Tensor(c!) steps, int base_rule, int evaluations, "
      "bool has_backup, bool check_second, bool count_skipped, float eps, float max_norm) -> ()");
  library.def("layout() -> int[]");
  // 0 baseline, 1 AVX2, 2 AVX-512: what the CPU loops run with.
  library.def("cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CompositeExplicitAutograd, library) {
  library.impl("layout", TORCH_BOX(&layout));
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace wsam_fused
