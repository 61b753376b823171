// Launches of kernels.cuh: on the current stream, with as many blocks as the device holds at once,
// without waiting for anything.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.cuh"

namespace wsam_fused {

// Runs the operations where `table` is.
struct Device {
  template <typename Op>
  static void walk(const Op& op, const torch::stable::Tensor& table) {
    launch(walk_kernel<Op>, op, table.get_device_index());
  }

  template <typename Op>
  static void reduce(const Op& op, const torch::stable::Tensor& table) {
    launch(reduce_kernel<Op>, op, table.get_device_index());
  }

 private:
  template <typename Op>
  static void launch(void (*kernel)(Op), const Op& op, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    int processors = 0, resident = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
    const int64_t at_once = int64_t(processors) * greater(resident, 1);
    const unsigned blocks = unsigned(smaller(op.plan.chunks, at_once));
    if (blocks == 0) return;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace wsam_fused
