// Runs a CUDA kernel on the CPU. All threads of all blocks take turns: each runs until it has to
// wait for its block (__syncthreads) or ends, and who is next is up to a seed. A kernel that lacks
// a barrier then gives other results for some seed, and a barrier that not all threads of a block
// reach is an error. What a GPU's memory does besides is not emulated: caches, and writes that
// others see late.
//
// Threads are stacks, begun with makecontext and left and entered again with _setjmp and _longjmp:
// swapcontext would ask the operating system for something every time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "stacks.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define WSAM_SHARED(Type, name) Type& name = *static_cast<Type*>(grid.shared(sizeof(Type)))

namespace wsam_fused {

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

class Grid {
 public:
  using Call = void (*)(const void*);

  // Calls call(context) in every thread.
  void run(Call call, const void* context, unsigned blocks, unsigned threads, uint32_t seed) {
    call_ = call;
    context_ = context;
    gridDim.x = blocks;
    blocks_ = std::vector<Block>(blocks);
    ready_.clear();
    while (threads_.size() < size_t(blocks) * threads) {
      threads_.push_back(std::make_unique<Thread>());
    }
    for (unsigned b = 0; b < blocks; ++b) {
      for (unsigned t = 0; t < threads; ++t) {
        Thread& thread = *threads_[b * threads + t];
        thread.block = b;
        thread.index = t;
        thread.state = kNew;
        blocks_[b].threads.push_back(&thread);
        ready_.push_back(&thread);
      }
    }
    std::mt19937 random(seed);
    while (!ready_.empty()) {
      current_ = next(random, seed);
      turn();
      settle(blocks_[current_->block]);
    }
  }

  // The thread waits for the others of its block.
  void wait() {
    current_->state = kWaiting;
    if (_setjmp(current_->place) == 0) {
      leave(current_->stack, scheduler_stack_);
      _longjmp(scheduler_, 1);
    }
    arrive(current_->stack, scheduler_stack_);
  }

  // Memory of the thread's block; it begins with anything.
  void* shared(size_t size) {
    std::unique_ptr<char[]>& memory = blocks_[blockIdx.x].memory;
    if (!memory) {
      memory.reset(new char[size]);
      std::memset(memory.get(), 0xa5, size);
    }
    return memory.get();
  }

 private:
  static constexpr size_t kStack = 64 * 1024;
  enum State { kNew, kWaiting, kEnded };

  struct Thread {
    unsigned block, index;
    State state;
    jmp_buf place;
    std::unique_ptr<char[]> memory{new char[kStack]};
    Stack stack{memory.get(), kStack};
  };

  struct Block {
    std::vector<Thread*> threads;
    size_t waiting = 0;
    size_t ended = 0;
    std::unique_ptr<char[]> memory;
  };

  // 0: who has waited longest. 1: who came last. Others: anyone.
  Thread* next(std::mt19937& random, uint32_t seed) {
    Thread* thread = ready_.front();
    if (seed == 0) {
      ready_.pop_front();
      return thread;
    }
    if (seed > 1) std::swap(ready_[random() % ready_.size()], ready_.back());
    thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  // Lets the current thread go on until it waits or ends.
  void turn() {
    threadIdx.x = current_->index;
    blockIdx.x = current_->block;
    if (_setjmp(scheduler_) != 0) {
      arrive(scheduler_stack_, current_->stack);
      return;
    }
    leave(scheduler_stack_, current_->stack);
    if (current_->state == kWaiting) _longjmp(current_->place, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = current_->memory.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Grid::main, 0);
    setcontext(&context);
  }

  static void main();

  // The block's threads go on once all of them wait.
  void settle(Block& block) {
    ++(current_->state == kEnded ? block.ended : block.waiting);
    if (block.waiting == 0 || block.waiting + block.ended < block.threads.size()) return;
    if (block.ended > 0) throw std::runtime_error("not all threads of a block reach a barrier");
    block.waiting = 0;
    ready_.insert(ready_.end(), block.threads.begin(), block.threads.end());
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Block> blocks_;
  std::deque<Thread*> ready_;
  Thread* current_ = nullptr;
  jmp_buf scheduler_;
  Stack scheduler_stack_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
};

inline Grid grid;

inline void Grid::main() {
  arrive(grid.current_->stack, grid.scheduler_stack_);
  grid.call_(grid.context_);
  grid.current_->state = kEnded;
  leave(grid.current_->stack, grid.scheduler_stack_, true);
  _longjmp(grid.scheduler_, 1);
}

inline void __syncthreads() { grid.wait(); }
inline void __threadfence() {}
inline double atomicAdd(double* address, double value) {
  const double before = *address;
  *address += value;
  return before;
}

template <typename Op>
void run_grid(void (*kernel)(Op), const Op& op, int64_t blocks, int threads, uint32_t seed) {
  struct Launch {
    void (*kernel)(Op);
    const Op& op;
  } const launch{kernel, op};
  const auto call = [](const void* context) {
    const Launch& given = *static_cast<const Launch*>(context);
    given.kernel(given.op);
  };
  grid.run(call, &launch, unsigned(blocks), unsigned(threads), seed);
}

}  // namespace wsam_fused
