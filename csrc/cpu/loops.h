// What the three CPU operations have in common: threads over chunks, and the switch over dtypes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "../check.h"
#include "isa.h"

// Tells the compiler that iterations are independent although pointers may be equal (the memory of
// a dead operand is reused): element i is only ever touched by iteration i.
#if defined(__clang__)
#define WSAM_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define WSAM_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#else
#define WSAM_INDEPENDENT_ITERATIONS
#endif

namespace wsam_fused {

// Elements below which another thread is not woken: a choice, not tuned.
constexpr int64_t kGrainElements = 32768;

template <typename Body>
void for_each_chunk(const Plan& plan, const Body& body) {
  const int64_t grain = plan.chunk_size < kGrainElements ? kGrainElements / plan.chunk_size : 1;
  torch::stable::parallel_for(0, plan.chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

// Calls visit(tensor, begin, end) for every piece of a tensor that lies in the chunk.
template <typename Visit>
void for_each_segment(const Plan& plan, int64_t chunk, const Visit& visit) {
  const int64_t last = plan.last_tensor(chunk);
  for (int64_t tensor = plan.first_tensor[chunk]; tensor <= last; ++tensor) {
    const Segment segment = plan.segment(chunk, tensor);
    if (segment.begin < segment.end) visit(tensor, segment.begin, segment.end);
  }
}

inline void check_grad_dtype(ScalarType dtype, ScalarType grad_dtype) {
  STD_TORCH_CHECK(grad_dtype == dtype, "grad_dtype differs from dtype, which the CPU kernels do ",
                  "not support");
}

// Calls body with a value of the C++ type of a dtype that is computed in as it is.
template <typename Body>
void with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, "dtype of the parameters is not float32, float64, bfloat16, float16");
  }
}

// Where the elements of one segment begin.
template <typename T>
T* segment(const Plan& plan, TableRow row, int64_t tensor, int64_t begin) {
  T* address = plan.address<T>(row, tensor);
  return address ? address + begin : nullptr;
}

}  // namespace wsam_fused
