// The byte layout that Python (wsam_fused/plan.py) and the kernels share.
//
// A plan describes a list of tensors without boxing the tensors themselves: one int64 table holds
// a column per tensor (its addresses, where it starts in the virtual index space, its size, its
// parameter group), a second list says with which tensor every chunk of that space begins. Chunks
// have one size, so large tensors are split, small ones are packed, and the work per chunk is the
// same whatever the list looks like. Nothing here depends on torch: the same index arithmetic
// serves the CPU loops, the GPU blocks and the tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WSAM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// The loops are compiled once per instruction set (cpu/isa.h); everything they call has to be
// inlined into them to be compiled with them.
#define WSAM_HOST_DEVICE inline __attribute__((always_inline))
#else
#define WSAM_HOST_DEVICE inline
#endif

namespace wsam_fused {

// Rows of the table. An address of 0 means "this tensor has none in this step".
enum TableRow : int {
  kParam = 0,  // the parameter, at w or at the perturbed point
  kGrad1,      // gradient at w
  kGrad2,      // gradient at the ascent point
  kGrad3,      // gradient at the descent point
  kBackup,     // copy of w, when it is restored from one
  kState1,     // momentum_buffer or exp_avg
  kState2,     // exp_avg_sq
  kState3,     // max_exp_avg_sq
  kOffset,     // first index in the virtual space, a multiple of kAlignment
  kSize,       // number of elements, at least 1
  kGroup,      // row of the group table
  kTableRows
};

// Virtual offsets are multiples of this, so that a chunk border inside an aligned tensor is
// aligned too.
constexpr int64_t kAlignment = 64;

// Columns of the group table (float64), one row per parameter group.
enum GroupColumn : int {
  kRho = 0,
  kSign,  // -1 when the objective is maximized, else 1
  kH1,
  kH2,
  kH3,  // what the base rule is fed: h = sum of kHk * gk
  kD1,
  kD2,
  kD3,  // the decoupled term:        d = sum of kDk * gk
  kLr,
  kL2,       // weight decay added to h
  kDecay,    // decoupled weight decay: w <- w * (1 - lr * decay)
  kBeta1,    // momentum for SGD
  kBeta2,    // dampening for SGD
  kRuleEps,  // Adam's eps
  kNesterov,
  kGroupColumns
};

// Slots of the scalars (float64) that are shared by all lists of one device.
enum ScalarSlot : int {
  kMetricSq = 0,  // sum of M * g1^2, the squared norm that scales the perturbation
  kGrad1Sq,       // sum of g1^2
  kGrad2Sq,       // sum of g2^2
  kSkipped,       // number of steps skipped because a norm was not finite
  kScalarSlots
};

// Flags (float64) of one list.
enum Flag : int { kPerturbed = 0, kFlags };

enum Geometry : int { kEuclidean = 0, kAdaptive };

enum BaseRule : int { kNone = 0, kSgd, kMomentum, kAdam, kAmsgrad };

struct Plan {
  const int64_t* table;         // kTableRows x tensors, row-major
  const int64_t* first_tensor;  // one per chunk: the first tensor that reaches into it
  int64_t tensors;
  int64_t chunks;
  int64_t chunk_size;

  WSAM_HOST_DEVICE int64_t at(TableRow row, int64_t tensor) const {
    return table[row * tensors + tensor];
  }
  template <typename T>
  WSAM_HOST_DEVICE T* address(TableRow row, int64_t tensor) const {
    return reinterpret_cast<T*>(at(row, tensor));
  }
};

// Calls visit(tensor, begin, end) for every piece of a tensor that lies in the chunk; begin and end
// are element indices within the tensor.
template <typename Visit>
WSAM_HOST_DEVICE void for_each_segment(const Plan& plan, int64_t chunk, Visit&& visit) {
  const int64_t low = chunk * plan.chunk_size;
  const int64_t high = low + plan.chunk_size;
  for (int64_t tensor = plan.first_tensor[chunk]; tensor < plan.tensors; ++tensor) {
    const int64_t offset = plan.at(kOffset, tensor);
    if (offset >= high) break;
    const int64_t size = plan.at(kSize, tensor);
    const int64_t begin = low > offset ? low - offset : 0;
    const int64_t end = high - offset < size ? high - offset : size;
    if (begin < end) visit(tensor, begin, end);
  }
}

}  // namespace wsam_fused
