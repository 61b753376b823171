// The operations and their contracts.
//
// They read a plan (plan.h): addresses, not tensors, so the schemas cannot say what is written
// through them. They are private for that reason; wsam_fused/backends/native.py is their caller.
// `dtype` is that of parameters and backups, `grad_dtype` that of all gradients, `state_dtype` that
// of the states: float32 (float64 if the parameters are), or that of 16-bit parameters. With
// has_master the backups are float32 and always there: they are the weights, and the parameters
// are their copy in 16 bits.
#pragma once

namespace wsam_fused {

// Writes two sums over the gradient list in row `gradient` to `scalars`, or adds them: that of its
// squares, and for the first gradient that of M g^2, for others with with_first that of g1 g.
// `partials` is scratch, 2 float64 per chunk.
constexpr char kReduceSchema[] =
    "reduce(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType grad_dtype, "
    "Tensor groups, Tensor(a!) partials, Tensor(b!) scalars, Tensor(c!) flags, int gradient, "
    "int geometry, bool with_first, bool accumulate, bool has_master) -> ()";

// Moves the parameters from the point where they are to another one.
constexpr char kPerturbSchema[] =
    "perturb_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType "
    "grad_dtype, "
    "Tensor groups, Tensor scalars, Tensor(a!) flags, int geometry, bool has_backup, "
    "bool has_master, int target) -> ()";

// Restores, updates parameters and states, counts the steps. Bit k of `required`: a parameter
// without gradient k + 1 is not updated; of `checked`: the norm of that gradient is known, and the
// step is skipped if it is not finite. keep_point: the update starts from where the parameters are.
// rounding_seed: what is bfloat16 is rounded by chance, from this seed; -1: all to nearest.
constexpr char kUpdateSchema[] =
    "update_(Tensor table, Tensor chunks, int chunk_size, ScalarType dtype, ScalarType grad_dtype, "
    "ScalarType state_dtype, Tensor groups, Tensor(a!) scalars, Tensor(b!) flags, "
    "Tensor(c!) steps, int base_rule, int evaluations, int required, int checked, "
    "bool has_backup, bool has_master, bool keep_point, bool count_skipped, int rounding_seed) "
    "-> ()";

}  // namespace wsam_fused
