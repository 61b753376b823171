#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "operations.h"

namespace wsam_fused {

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CUDA, library) {
  library.impl("update_", TORCH_BOX(&update<Device>));
}

}  // namespace wsam_fused
