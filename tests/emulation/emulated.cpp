// The GPU operations on the CPU: the per-thread code of csrc/cuda, run block by block and thread by
// thread, with the operations' own checks and dtype switches. The kernels around it (launch.cuh)
// and what a real GPU adds, memory order above all, are not tested by this.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/operations.h"
#include "schemas.h"

namespace wsam_fused {
namespace {

// Few enough that a block gets several chunks, and more than one block gets any.
int64_t blocks_of(const Plan& plan) { return smaller(plan.chunks, 3); }

// Visits the windows of every chunk that the block takes.
template <typename Visit>
void for_each_window(const Plan& plan, int64_t chunk, const Visit& visit) {
  const int64_t last = plan.last_tensor(chunk);
  for (int64_t first = plan.first_tensor[chunk]; first <= last; first += kSlots) {
    visit(window_at(plan, chunk, first), first);
  }
}

Sums block_total(std::vector<Sums> sums) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    for (int thread = 0; thread < kThreads; ++thread) fold(sums.data(), thread, half);
  }
  return sums[0];
}

struct Emulator {
  template <typename Op>
  static void walk(const Op& op, const Tensor&) {
    const auto step = op.begin();
    for (int64_t block = 0; block < blocks_of(op.plan); ++block) {
      // Shared memory is not initialized on a device either.
      std::vector<typename Op::Slot> slots(kSlots);
      for (auto& slot : slots) slot.forget();
      for (int64_t chunk = block; step.active && chunk < op.plan.chunks;
           chunk += blocks_of(op.plan)) {
        for_each_window(op.plan, chunk, [&](const Window& window, int64_t first) {
          for (int t = 0; t < window.count; ++t) op.fill(slots[t], chunk, first + t, step);
          // In reverse: nothing may depend on the order of the threads.
          for (int t = kThreads - 1; t >= 0; --t) op.work(window, slots.data(), t);
        });
      }
    }
    for (int thread = 0; thread < kThreads; ++thread) op.finish(thread, step);
  }

  template <typename Op>
  static void reduce(const Op& op, const Tensor&) {
    for (int64_t block = 0; block < blocks_of(op.plan); ++block) {
      std::vector<typename Op::Slot> slots(kSlots);
      for (int64_t chunk = block; chunk < op.plan.chunks; chunk += blocks_of(op.plan)) {
        std::vector<Sums> sums(kThreads, Sums{0, 0});
        for_each_window(op.plan, chunk, [&](const Window& window, int64_t first) {
          for (int t = 0; t < window.count; ++t) op.fill(slots[t], chunk, first + t);
          for (int t = 0; t < kThreads; ++t) op.work(window, slots.data(), t, sums[t]);
        });
        op.store_partial(chunk, block_total(sums));
      }
    }
    std::vector<Sums> sums;
    for (int thread = 0; thread < kThreads; ++thread) sums.push_back(op.sum_of_partials(thread));
    op.store_total(block_total(sums));
  }
};

// Which tensor, and where in the chunk.
struct NamedSlot {
  Place place;
  int64_t tensor;
};

// What the threads of a block visit in one chunk: thread, tensor, first element, and how many, for
// every piece of at most `width` elements.
template <int width>
void append_visits(const Plan& plan, int64_t chunk, std::vector<int64_t>& visits) {
  for_each_window(plan, chunk, [&](const Window& window, int64_t first) {
    NamedSlot slots[kSlots];
    for (int t = 0; t < window.count; ++t) {
      slots[t] = {place_of(plan, chunk, first + t), first + t};
    }
    for (int thread = 0; thread < kThreads; ++thread) {
      for_each_share<width>(
          window, slots, thread, [&](const NamedSlot& slot, int begin, int end, int stride) {
            for (int i = begin; i < end; i += stride) {
              const Piece piece = piece_at<width>(i, end, true);
              visits.insert(visits.end(),
                            {thread, slot.tensor, slot.place.begin + piece.begin, piece.count});
            }
          });
    }
  });
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
  library.def("visits(Tensor table, Tensor chunks, int chunk_size, int chunk, int width) -> int[]");
  library.def(kReduceSchema);
  library.def(kPerturbSchema);
  library.def(kUpdateSchema);
}

STABLE_TORCH_LIBRARY_IMPL(wsam_fused_emulated, CPU, library) {
  library.impl("visits", TORCH_BOX(&visits));
  library.impl("reduce", TORCH_BOX(&reduce<Emulator>));
  library.impl("perturb_", TORCH_BOX(&perturb<Emulator>));
  library.impl("update_", TORCH_BOX(&update<Emulator>));
}

}  // namespace wsam_fused
