// The operations and their contracts.
//
// They read a plan (plan.h): addresses, not tensors, so the schemas cannot say what is written
// through them. They are private for that reason; wsam_fused/backends/native.py is their caller.
// `dtype` is that of parameters and backups, `grad_dtype` that of all gradients; states are
// float32, or float64 if the parameters are.
#pragma once

namespace wsam_fused {

// Writes the sums of squares of the gradient list in row `gradient` to `scalars`, or adds them;
// `partials` is scratch, 2 float64 per chunk.
constexpr char kReduceSchema[] =
    "reduce(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType grad_dtype, "
    "Tensor(a!) partials, Tensor(b!) scalars, Tensor(c!) flags, int gradient, int geometry, "
    "bool accumulate) -> ()";

// Perturbs the parameters, or with undo=True takes them back.
constexpr char kPerturbSchema[] =
    "perturb_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType "
    "grad_dtype, "
    "Tensor groups, Tensor scalars, Tensor(a!) flags, int geometry, bool has_backup, bool undo) "
    "-> ()";

// Restores, updates parameters and states, counts the steps. check_second: the norm of the second
// gradient is known, and the step is skipped if it is not finite.
constexpr char kUpdateSchema[] =
    "update_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType grad_dtype, "
    "Tensor groups, Tensor(a!) scalars, Tensor(b!) flags, Tensor(c!) steps, int base_rule, "
    "int evaluations, bool has_backup, bool check_second, bool count_skipped) -> ()";

}  // namespace wsam_fused
