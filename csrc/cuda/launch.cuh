// Kernels around the per-thread work of reduce.h, perturb.h and update.h, and their launches: on
// the current stream, with as many blocks as the device holds at once, without waiting for
// anything.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "reduce.h"
#include "window.h"

namespace wsam_fused {

// Whether this block is the last one that gets here; what the others have written is then visible
// to all its threads. The counter is back at 0 afterwards.
__device__ inline bool is_last_block(double* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1.0) == double(gridDim.x - 1);
    if (last) *arrived = 0.0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// perturb_ and update_: windows of a chunk, chunk after chunk.
template <typename Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerProcessor) walk_kernel(const Op op) {
  __shared__ typename Op::Slot slots[kSlots];
  const int thread = threadIdx.x;
  const Plan& plan = op.plan;
  const auto step = op.begin();
  if (step.active) {
    if (thread < kSlots) slots[thread].forget();
    for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) {
      const int64_t last = plan.last_tensor(chunk);
      for (int64_t first = plan.first_tensor[chunk]; first <= last; first += kSlots) {
        const Window window = window_at(plan, chunk, first);
        if (thread < window.count) op.fill(slots[thread], chunk, first + thread, step);
        __syncthreads();
        op.work(window, slots, thread);
        __syncthreads();
      }
    }
  }
  if (is_last_block(op.flags + kArrived)) op.finish(thread, step);
}

// Adds the sums of all threads; every thread gets the total.
__device__ inline Sums block_total(Sums* sums, const Sums& mine) {
  const int thread = threadIdx.x;
  sums[thread] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    fold(sums, thread, half);
  }
  __syncthreads();
  const Sums total = sums[0];
  __syncthreads();
  return total;
}

template <typename Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerProcessor) reduce_kernel(const Op op) {
  __shared__ typename Op::Slot slots[kSlots];
  __shared__ Sums sums[kThreads];
  const int thread = threadIdx.x;
  const Plan& plan = op.plan;
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) {
    Sums mine{0, 0};
    const int64_t last = plan.last_tensor(chunk);
    for (int64_t first = plan.first_tensor[chunk]; first <= last; first += kSlots) {
      const Window window = window_at(plan, chunk, first);
      if (thread < window.count) op.fill(slots[thread], chunk, first + thread);
      __syncthreads();
      op.work(window, slots, thread, mine);
      __syncthreads();
    }
    const Sums total = block_total(sums, mine);
    if (thread == 0) op.store_partial(chunk, total);
  }
  if (is_last_block(op.flags + kArrived)) {
    const Sums total = block_total(sums, op.sum_of_partials(thread));
    if (thread == 0) op.store_total(total);
  }
}

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
