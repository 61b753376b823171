// Checks of what a table says. The host can read it, so an index that would lead a kernel out of a
// tensor is an exception here; on a GPU nothing could report it without waiting.
//
// What remains the caller's promise: an address that is not 0 is that of kSize elements.
#pragma once

#include "../check.h"

namespace wsam_fused {

// Larger than any memory, and small enough that sums and products of sizes do not overflow.
constexpr int64_t kLargestSize = int64_t(1) << 48;

inline void check_address(const Plan& plan, TableRow row, const char* name, int64_t tensor) {
  STD_TORCH_CHECK(plan.at(row, tensor) != 0, "table has no address of the ", name, " of tensor ",
                  tensor, ", which the operation needs");
}

// Calls check_tensor(tensor) for the addresses of each, once its place is known to be right.
template <typename Check>
void check_table(const Plan& plan, int64_t groups, const Check& check_tensor) {
  STD_TORCH_CHECK(plan.chunk_size <= kLargestSize, "chunk_size is ", plan.chunk_size,
                  ", expected at most ", kLargestSize);
  int64_t offset = 0, chunk = 0;
  for (int64_t tensor = 0; tensor < plan.tensors; ++tensor) {
    const int64_t size = plan.at(kSize, tensor), group = plan.at(kGroup, tensor);
    STD_TORCH_CHECK(size >= 1 && size <= kLargestSize, "table has ", size, " as size of tensor ",
                    tensor, ", expected 1 to ", kLargestSize);
    STD_TORCH_CHECK(plan.at(kOffset, tensor) == offset, "table has ", plan.at(kOffset, tensor),
                    " as offset of tensor ", tensor, ", expected ", offset);
    STD_TORCH_CHECK(group >= 0 && group < groups, "table has ", group, " as group of tensor ",
                    tensor, ", expected 0 to ", groups - 1, ", the rows of groups");
    offset += (size + kAlignment - 1) / kAlignment * kAlignment;
    STD_TORCH_CHECK(offset <= kLargestSize, "table has more than ", kLargestSize, " elements");
    for (; chunk < plan.chunks && chunk * plan.chunk_size < offset; ++chunk) {
      STD_TORCH_CHECK(plan.first_tensor[chunk] == tensor, "chunks has ", plan.first_tensor[chunk],
                      " as first tensor of chunk ", chunk, ", expected ", tensor);
    }
    check_address(plan, kParam, "parameter", tensor);
    check_tensor(tensor);
  }
  const int64_t chunks = (offset + plan.chunk_size - 1) / plan.chunk_size;
  STD_TORCH_CHECK(plan.chunks == chunks, "chunks has ", plan.chunks, " elements, expected ", chunks,
                  " for ", offset, " elements of the table in chunks of ", plan.chunk_size);
}

inline Point checked_point(double at, bool has_backup) {
  STD_TORCH_CHECK(at == kWeights || at == kAscent || at == kDescent || at == kProbe, "flags has ",
                  at, " as the point of the parameters, expected 0 to ", kPoints - 1);
  const Point point = Point(int(at));
  STD_TORCH_CHECK(point != kProbe || has_backup,
                  "flags has the probe as the point of the parameters, which needs a backup");
  return point;
}

}  // namespace wsam_fused
