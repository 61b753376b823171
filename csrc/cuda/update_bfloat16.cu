// The kernels of update_ for parameters of this type.
#include "launch.cuh"
#include "operations.h"

namespace wsam_fused {

template void update_typed<Device, BFloat16, BFloat16>(const UpdateCall&);

}  // namespace wsam_fused
