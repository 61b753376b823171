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
#define WSAM_UNROLL _Pragma("unroll")
#define WSAM_NO_UNROLL _Pragma("unroll 1")
#elif defined(__GNUC__)
// The loops are compiled once per instruction set (cpu/isa.h); everything they call has to be
// inlined into them to be compiled with them.
#define WSAM_HOST_DEVICE inline __attribute__((always_inline))
#define WSAM_UNROLL
#define WSAM_NO_UNROLL
#else
#define WSAM_HOST_DEVICE inline
#define WSAM_UNROLL
#define WSAM_NO_UNROLL
#endif

namespace wsam_fused {

// Rows of the table. An address of 0 means "this tensor has none in this step".
enum TableRow : int {
  kParam = 0,  // the parameter, at w or at the perturbed point
  kGrad1,      // gradient at w
  kGrad2,      // gradient at the ascent point
  kGrad3,      // gradient at the descent point
  kBackup,     // copy of w, when it is restored from one; or the float32 weights that p is of
  kState1,     // momentum_buffer or exp_avg
  kState2,     // exp_avg_sq
  kState3,     // max_exp_avg_sq
  kOffset,     // first index in the virtual space, a multiple of kAlignment
  kSize,       // number of elements, at least 1
  kGroup,      // row of the group table
  kKey,        // which parameter of the optimizer it is: tensors of one noise differ by it
  kTableRows
};

// Virtual offsets are multiples of this, so that a chunk border inside an aligned tensor is
// aligned too.
constexpr int64_t kAlignment = 64;

// Columns of the group table (float64), one row per parameter group.
enum GroupColumn : int {
  kRho = 0,     // radius of the ascent point
  kRhoDescent,  // radius of the descent point
  kDelta,       // length of the probe, elementwise
  kEta,         // of the metric
  kAscentEps,   // added to the norm that the radii are divided by
  kMaxNorm,     // clips each gradient's norm; negative is none
  kSign,        // -1 when the objective is maximized, else 1
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
  kGrad3Sq,       // sum of g3^2
  kDot12,         // sum of g1 g2
  kSkipped,       // number of steps skipped because a norm was not finite
  kSeed,          // of the noise, a whole number
  kInvScale1,     // 1 / loss scale of g1: what is in memory times this is the gradient
  kInvScale2,
  kInvScale3,
  kFoundInf,  // not 0: somebody else has seen a gradient that is not finite
  kScalarSlots
};

// Flags (float64) of one list. kAt is the point where the parameters are; kArrived counts the GPU
// blocks that are done, and is 0 between kernels.
enum Flag : int { kAt = 0, kArrived, kFlags };

// Points between which perturb_ moves the parameters, with M the metric and z noise of -1 and 1:
enum Point : int {
  kWeights = 0,  // w
  kAscent,       // w + rho M g1 / (norm + eps)
  kDescent,      // w - rho_descent M g1 / (norm + eps)
  kProbe,        // w + delta z
  kPoints
};

// The metric M. The noise is none, but a direction like M g1.
enum Geometry : int { kEuclidean = 0, kAdaptive, kFisher, kNoise };

enum BaseRule : int { kNone = 0, kSgd, kMomentum, kAdam, kAmsgrad };

WSAM_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
WSAM_HOST_DEVICE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements of one tensor; empty if end <= begin.
struct Segment {
  int64_t begin, end;
};

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
  // The last tensor that reaches into the chunk.
  WSAM_HOST_DEVICE int64_t last_tensor(int64_t chunk) const {
    if (chunk + 1 == chunks) return tensors - 1;
    const int64_t next = first_tensor[chunk + 1];
    return at(kOffset, next) < (chunk + 1) * chunk_size ? next : next - 1;
  }
  // What of the tensor lies in the chunk.
  WSAM_HOST_DEVICE Segment segment(int64_t chunk, int64_t tensor) const {
    const int64_t low = chunk * chunk_size - at(kOffset, tensor);
    return {greater(low, 0), smaller(low + chunk_size, at(kSize, tensor))};
  }
};

// Whether the tensor has all gradients that are required: bit k stands for gradient k + 1.
WSAM_HOST_DEVICE bool has_gradients(const Plan& plan, int64_t tensor, int required) {
  bool all = true;
  for (int k = 0; k < 3; ++k) {
    if (required >> k & 1) all &= plan.at(TableRow(kGrad1 + k), tensor) != 0;
  }
  return all;
}

}  // namespace wsam_fused
