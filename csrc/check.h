// Argument checks of the operations. Every message names the argument, what it was and what it has
// to be. What stands in a table is checked where the host can read it (cpu/check_table.h), but for
// the addresses: the operations are private, and wsam_fused/plan.py builds the tables from tensors
// that it has checked.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "plan.h"

namespace wsam_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The constants of plan.h in the order that wsam_fused/plan.py checks them against its own.
inline std::vector<int64_t> layout() {
  return {kTableRows, kGroupColumns, kScalarSlots, kFlags, kAlignment};
}

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(tensor.defined(), name, " is undefined");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(tensor.numel() == size, name, " has ", tensor.numel(), " elements, expected ",
                  size);
}

inline Plan checked_plan(const Tensor& table, const Tensor& chunks, int64_t chunk_size) {
  STD_TORCH_CHECK(chunk_size > 0 && chunk_size % kAlignment == 0, "chunk_size is ", chunk_size,
                  ", expected a positive multiple of ", kAlignment);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == kTableRows, "table has the wrong shape, ",
                  "expected ", int(kTableRows), " rows and a column per tensor");
  const int64_t tensors = table.size(1);
  check_tensor(table, "table", ScalarType::Long, kTableRows * tensors);
  check_tensor(chunks, "chunks", ScalarType::Long, chunks.numel());
  const Plan plan{static_cast<const int64_t*>(table.const_data_ptr()),
                  static_cast<const int64_t*>(chunks.const_data_ptr()), tensors, chunks.numel(),
                  chunk_size};
  return plan;
}

inline const double* checked_groups(const Tensor& groups) {
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) == kGroupColumns,
                  "groups has the wrong shape, expected a row per parameter group and ",
                  int(kGroupColumns), " columns");
  check_tensor(groups, "groups", ScalarType::Double, groups.size(0) * kGroupColumns);
  return static_cast<const double*>(groups.const_data_ptr());
}

inline double* checked_doubles(Tensor& tensor, const char* name, int64_t size) {
  check_tensor(tensor, name, ScalarType::Double, size);
  return static_cast<double*>(tensor.mutable_data_ptr());
}

// The kernels of a device read all of these through its own addresses.
inline void check_one_device(const Tensor& table, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(other->get_device_index() == table.get_device_index(),
                    "an argument is on device ", other->get_device_index(), ", expected device ",
                    table.get_device_index(), ", where table is");
  }
}

// An argument that is written may not be in the memory of another one.
inline void check_apart(std::initializer_list<const Tensor*> written,
                        std::initializer_list<const Tensor*> read) {
  const auto begin = [](const Tensor* tensor) {
    return reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
  };
  const auto overlap = [&](const Tensor* a, const Tensor* b) {
    const auto bytes = [](const Tensor* tensor) {
      const uintptr_t size = tensor->scalar_type() == ScalarType::Float ? 4 : 8;
      return uintptr_t(tensor->numel()) * size;
    };
    return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
  };
  for (const Tensor* const* a = written.begin(); a != written.end(); ++a) {
    for (const Tensor* const* b = a + 1; b != written.end(); ++b) {
      STD_TORCH_CHECK(!overlap(*a, *b), "two arguments that are written share memory");
    }
    for (const Tensor* b : read) {
      STD_TORCH_CHECK(!overlap(*a, b), "an argument that is written shares memory with another");
    }
  }
}

inline void check_gradient(int64_t gradient) {
  STD_TORCH_CHECK(gradient >= kGrad1 && gradient <= kGrad3, "gradient is ", gradient,
                  ", expected the row of a gradient in the table");
}

inline void check_metric(int64_t geometry) {
  STD_TORCH_CHECK(geometry >= kEuclidean && geometry <= kFisher, "geometry is ", geometry,
                  ", expected 0 to ", int(kFisher));
}

inline void check_geometry(int64_t geometry, bool has_backup) {
  check_metric(geometry);
  STD_TORCH_CHECK(geometry == kEuclidean || has_backup,
                  "geometry is not Euclidean, which needs has_backup=True");
}

inline void check_point(int64_t target, bool has_backup) {
  STD_TORCH_CHECK(target >= kWeights && target < kPoints, "target is ", target, ", expected 0 to ",
                  kPoints - 1);
  STD_TORCH_CHECK(target != kProbe || has_backup, "target is the probe, which needs a backup");
}

// Weights in float32 are those of parameters of 16 bits. These are never recomputed.
inline void check_precision(ScalarType dtype, bool has_backup, bool has_master, bool moves) {
  const bool low = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(!has_master || (low && has_backup),
                  "has_master is True, which needs 16-bit parameters and has_backup=True");
  STD_TORCH_CHECK(!low || has_backup || !moves,
                  "dtype has 16 bits, which needs has_backup=True to move parameters");
}

inline void check_states(ScalarType dtype, ScalarType state_dtype, int64_t rounding_seed) {
  const bool low = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const ScalarType wide = low ? ScalarType::Float : dtype;
  STD_TORCH_CHECK(state_dtype == wide || state_dtype == dtype,
                  "state_dtype is neither that of the parameters nor float32");
  STD_TORCH_CHECK(rounding_seed >= -1 && rounding_seed < int64_t(1) << 53, "rounding_seed is ",
                  rounding_seed, ", expected -1 to 2^53 - 1");
  STD_TORCH_CHECK(rounding_seed < 0 || dtype == ScalarType::BFloat16,
                  "rounding_seed is not -1, which needs bfloat16 parameters");
}

inline void check_evaluations(int64_t evaluations, int64_t required, int64_t checked) {
  STD_TORCH_CHECK(evaluations >= 1 && evaluations <= 3, "evaluations is ", evaluations,
                  ", expected 1 to 3");
  STD_TORCH_CHECK(required > 0 && required < 1 << evaluations, "required is ", required,
                  ", expected a bit for at least one of ", evaluations, " gradients");
  STD_TORCH_CHECK(checked >= 0 && checked < 1 << evaluations, "checked is ", checked,
                  ", expected a bit for some of ", evaluations, " gradients");
}

}  // namespace wsam_fused
