#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "operations.h"

namespace wsam_fused {

// In files of their own, which are compiled at the same time.
extern template void update_typed<Device, BFloat16, BFloat16>(const UpdateCall&);
extern template void update_typed<Device, Half, Half>(const UpdateCall&);

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CUDA, library) {
  library.impl("update_", TORCH_BOX(&update<Device>));
}

}  // namespace wsam_fused
