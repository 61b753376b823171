// The library wsam_fused: its operations (schemas.h) and what it says about itself.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "check.h"
#include "cpu/isa.h"
#include "schemas.h"

namespace wsam_fused {
namespace {

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
  library.def(kReduceSchema);
  library.def(kPerturbSchema);
  library.def(kUpdateSchema);
  library.def("layout() -> int[]");
  // 0 baseline, 1 AVX2, 2 AVX-512: what the CPU loops run with.
  library.def("cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CompositeExplicitAutograd, library) {
  library.impl("layout", TORCH_BOX(&layout));
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace wsam_fused
