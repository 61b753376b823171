// The GPU operations on the CPU: the kernels of csrc/cuda, run thread by thread (grid.h), with the
// operations' own checks and dtype switches.
#include <torch/csrc/stable/library.h>

#include <vector>

// Before the kernels: the words of CUDA.
#include "grid.h"
// The kernels.
#include "cuda/kernels.cuh"
#include "cuda/operations.h"
#include "schemas.h"

namespace wsam_fused {
namespace {

uint32_t seed = 0;

void set_seed(int64_t value) { seed = uint32_t(value); }

struct Emulator {
  template <typename Op>
  static void walk(const Op& op, const Tensor&) {
    run_grid(walk_kernel<Op>, op, blocks_of(op.plan), kThreads, seed);
  }

  template <typename Op>
  static void reduce(const Op& op, const Tensor&) {
    run_grid(reduce_kernel<Op>, op, blocks_of(op.plan), kThreads, seed);
  }

 private:
  // Few enough that a block gets several chunks, and more than one block gets any.
  static int64_t blocks_of(const Plan& plan) { return smaller(plan.chunks, 3); }
};

// For the test of the emulation itself: every thread passes a number on to the next one.
struct PassOn {
  int64_t* received;
  int64_t barriers;  // between: 1 is right; 0: none; 2: one that a thread of the last block skips
};

struct Given {
  int64_t numbers[kThreads];
};

void pass_on_kernel(const PassOn op) {
  WSAM_SHARED(Given, given);
  const int thread = threadIdx.x;
  given.numbers[thread] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  given.numbers[thread] = 1000 + first + thread;
  const bool skips = thread == 0 && blockIdx.x + 1 == gridDim.x;
  if (op.barriers == 1 || (op.barriers == 2 && !skips)) __syncthreads();
  op.received[first + thread] = given.numbers[(thread + 1) % kThreads];
}

std::vector<int64_t> pass_on(int64_t barriers) {
  constexpr int64_t kBlocks = 3;
  std::vector<int64_t> received(kBlocks * kThreads);
  run_grid(pass_on_kernel, PassOn{received.data(), barriers}, kBlocks, kThreads, seed);
  return received;
}

// Which tensor, and where in the chunk.
struct NamedSlot {
  Place place;
  int64_t tensor;
};

// What the threads of a block visit in one chunk: thread, tensor, first element, and how many, for
// every piece of at most `width` elements.
template <int width>
void append_visits(const Plan& plan, int64_t chunk, std::vector<int64_t>& visits) {
  const int64_t last = plan.last_tensor(chunk);
  for (int64_t first = plan.first_tensor[chunk]; first <= last; first += kSlots) {
    const Window window = window_at(plan, chunk, first);
    NamedSlot slots[kSlots];
    for (int t = 0; t < window.count; ++t) {
      slots[t] = {place_of(plan, chunk, first + t), first + t};
    }
    for (int thread = 0; thread < kThreads; ++thread) {
      for_each_share<width>(
          window, slots, thread, [&](const NamedSlot& slot, int begin, int end, int stride) {
            for (int i = begin; i < end; i += stride) {
              for_each_piece<width>(i, end, true, [&](auto piece) {
                visits.insert(visits.end(),
                              {thread, slot.tensor, slot.place.begin + piece.begin, piece.width});
              });
            }
          });
    }
  }
}

std::vector<int64_t> visits(Tensor table, Tensor chunks, int64_t chunk_size, int64_t chunk,
                            int64_t width) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  std::vector<int64_t> found;
  if (width == 2) append_visits<2>(plan, chunk, found);
  if (width == 4) append_visits<4>(plan, chunk, found);
  if (width == 8) append_visits<8>(plan, chunk, found);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY(wsam_fused_emulated, library) {
  library.def("set_seed(int seed) -> ()");
  library.def("pass_on(int barriers) -> int[]");
  library.def("visits(Tensor table, Tensor chunks, int chunk_size, int chunk, int width) -> int[]");
  library.def(kReduceSchema);
  library.def(kPerturbSchema);
  library.def(kUpdateSchema);
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused_emulated, CompositeExplicitAutograd, library) {
  library.impl("set_seed", TORCH_BOX(&set_seed));
  library.impl("pass_on", TORCH_BOX(&pass_on));
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused_emulated, CPU, library) {
  library.impl("visits", TORCH_BOX(&visits));
  library.impl("reduce", TORCH_BOX(&reduce<Emulator>));
  library.impl("perturb_", TORCH_BOX(&perturb<Emulator>));
  library.impl("update_", TORCH_BOX(&update<Emulator>));
}

}  // namespace wsam_fused
