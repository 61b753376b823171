#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "operations.h"

namespace wsam_fused {

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CUDA, library) {
  library.impl("reduce", TORCH_BOX(&reduce<Device>));
}

}  // namespace wsam_fused
