// The kernels around the per-thread work of reduce.h, perturb.h and update.h: which block takes
// which chunk, what its threads share, and where they wait for each other.
//
// In CUDA's own words but without its headers: the tests run these kernels on the CPU, too
// (tests/emulation/grid.h), where a block's memory is no storage class.
#pragma once

#include "reduce.h"
#include "window.h"

#if !defined(WSAM_SHARED)
#define WSAM_SHARED(Type, name) __shared__ Type name
#endif

namespace wsam_fused {

// Whether this block is the last one that gets here: it sees what the others have written, and may
// write what they have read. The counter is back at 0 afterwards. `last` is the block's memory.
__device__ inline bool is_last_block(double* arrived, bool& last) {
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

template <typename Op>
struct WalkShared {
  typename Op::Slot slots[kSlots];
  bool last;
};

// perturb_ and update_: windows of a chunk, chunk after chunk.
template <typename Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerProcessor) walk_kernel(const Op op) {
  WSAM_SHARED(WalkShared<Op>, shared);
  typename Op::Slot(&slots)[kSlots] = shared.slots;
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
  if (is_last_block(op.flags + kArrived, shared.last)) op.finish(thread, step);
}

// Adds the sums of all threads, for thread 0. The threads have to meet before the next call.
__device__ inline Sums block_total(Sums* sums, const Sums& mine) {
  const int thread = threadIdx.x;
  sums[thread] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return sums[0];
}

template <typename Op>
struct ReduceShared {
  typename Op::Slot slots[kSlots];
  Sums sums[kThreads];
  bool last;
};

template <typename Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerProcessor) reduce_kernel(const Op op) {
  WSAM_SHARED(ReduceShared<Op>, shared);
  typename Op::Slot(&slots)[kSlots] = shared.slots;
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
    const Sums total = block_total(shared.sums, mine);
    if (thread == 0) op.store_partial(chunk, total);
  }
  if (is_last_block(op.flags + kArrived, shared.last)) {
    const Sums total = block_total(shared.sums, op.sum_of_partials(thread));
    if (thread == 0) op.store_total(total);
  }
}

}  // namespace wsam_fused
