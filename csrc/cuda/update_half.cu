// The kernels of update_ for parameters of this type.
#include "launch.cuh"
#include "operations.h"

namespace wsam_fused {

template void update_typed<Device, Half, Half>(const UpdateCall&);

}  // namespace wsam_fused
