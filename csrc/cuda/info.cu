// What the library of the CUDA kernels says about itself.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "../check.h"

namespace wsam_fused {
namespace {

// As the architecture macro counts: 800 is compute capability 8.0.
std::vector<int64_t> architectures() { return {__CUDA_ARCH_LIST__}; }

__global__ void probe_kernel() {}

// Raises what CUDA says if the kernels do not run on the device: no code for it, or a driver that
// is older than the runtime of this library.
void require_device(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t found = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // else the next launch on another device would report it
  STD_CUDA_CHECK(found);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wsam_fused, library) {
  library.def("cuda_layout() -> int[]");
  library.def("cuda_architectures() -> int[]");
  library.def("require_cuda_device(int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CompositeExplicitAutograd, library) {
  library.impl("cuda_layout", TORCH_BOX(&layout));
  library.impl("cuda_architectures", TORCH_BOX(&architectures));
  library.impl("require_cuda_device", TORCH_BOX(&require_device));
}

}  // namespace wsam_fused
