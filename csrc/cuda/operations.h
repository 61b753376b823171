// The three operations on a GPU, from the arguments of ops.cpp to one launch each. Executor is who
// runs a kernel: the device (launch.cuh), or in the tests a loop over blocks and threads.
#pragma once

#include <type_traits>

#include "../check.h"
#include "reduce.h"
#include "update.h"

namespace wsam_fused {

using torch::headeronly::Half;

// Calls body with a value of the C++ types of parameters and gradients.
template <typename Body>
void with_dtypes(ScalarType dtype, ScalarType grad_dtype, const Body& body) {
  if (dtype == ScalarType::Float) {
    if (grad_dtype == ScalarType::Float) return body(float{}, float{});
    if (grad_dtype == ScalarType::BFloat16) return body(float{}, BFloat16{});
    if (grad_dtype == ScalarType::Half) return body(float{}, Half{});
  } else if (dtype == grad_dtype) {
    if (dtype == ScalarType::BFloat16) return body(BFloat16{}, BFloat16{});
    if (dtype == ScalarType::Half) return body(Half{}, Half{});
    if (dtype == ScalarType::Double) return body(double{}, double{});
  }
  STD_TORCH_CHECK(false, "dtype and grad_dtype are none of the pairs that are compiled");
}

// Calls body with values of the C++ types of the weights and the states that belong to parameters
// of type P: these, or others for parameters of 16 bits.
template <typename P, bool has_states, typename Body>
void with_kept(bool has_master, bool narrow_states, const Body& body) {
  using Wide = typename ComputeType<P>::type;
  if constexpr (sizeof(P) < sizeof(Wide)) {
    if constexpr (has_states) {
      if (narrow_states) return has_master ? body(Wide{}, P{}) : body(P{}, P{});
    }
    if (has_master) return body(Wide{}, Wide{});
  }
  return body(P{}, Wide{});
}

// Calls body with a compile-time constant for the base rule.
template <typename Body>
void with_rule(int64_t base_rule, const Body& body) {
  switch (base_rule) {
    case kNone:
      return body(std::integral_constant<BaseRule, kNone>{});
    case kSgd:
      return body(std::integral_constant<BaseRule, kSgd>{});
    case kMomentum:
      return body(std::integral_constant<BaseRule, kMomentum>{});
    case kAdam:
      return body(std::integral_constant<BaseRule, kAdam>{});
    case kAmsgrad:
      return body(std::integral_constant<BaseRule, kAmsgrad>{});
    default:
      STD_TORCH_CHECK(false, "base_rule is ", base_rule, ", expected 0 to ", int(kAmsgrad));
  }
}

template <typename Executor>
void reduce(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, Tensor groups, Tensor partials, Tensor scalars, Tensor flags,
            int64_t gradient, int64_t geometry, bool with_first, bool accumulate, bool has_master) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  check_gradient(gradient);
  check_metric(geometry);
  double* const partial = checked_doubles(partials, "partials", 2 * plan.chunks);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_precision(dtype, has_master, has_master, false);
  check_one_device(table, {&chunks, &groups, &partials, &scalars, &flags});
  check_apart({&partials, &scalars, &flags}, {&table, &chunks, &groups});
  const auto run = [&](auto op) {
    op.plan = plan;
    op.groups = group_rows;
    op.partials = partial;
    op.scalars = scalar;
    op.flags = flag;
    op.gradient = TableRow(gradient);
    op.other = gradient != kGrad1 ? kGrad1 : has_master ? kBackup : kParam;
    op.accumulate = accumulate;
    Executor::reduce(op, table);
  };
  with_dtypes(dtype, grad_dtype, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    // Where the parameters are not read, one kernel for each type of gradient.
    if (gradient != kGrad1 && with_first) return run(Reduce<G, G, Pairing::kWithFirst>{});
    if (gradient != kGrad1 || geometry == kEuclidean) return run(Reduce<G, G, Pairing::kNone>{});
    if (geometry == kFisher) return run(Reduce<G, G, Pairing::kFisher>{});
    with_kept<P, false>(has_master, false,
                        [&](auto w, auto) { run(Reduce<decltype(w), G, Pairing::kAdaptive>{}); });
  });
}

template <typename Executor>
void perturb(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
             ScalarType grad_dtype, Tensor groups, Tensor scalars, Tensor flags, int64_t geometry,
             bool has_backup, bool has_master, int64_t target) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  const double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_geometry(geometry, has_backup);
  check_point(target, has_backup);
  check_precision(dtype, has_backup, has_master, true);
  check_one_device(table, {&chunks, &groups, &scalars, &flags});
  check_apart({&flags}, {&table, &chunks, &groups, &scalars});
  const auto run = [&](auto op) {
    op.plan = plan;
    op.groups = group_rows;
    op.scalars = scalar;
    op.flags = flag;
    op.has_backup = has_backup;
    op.target = Point(target);
    Executor::walk(op, table);
  };
  with_dtypes(dtype, grad_dtype, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    with_kept<P, false>(has_master, false, [&](auto w, auto) {
      using W = decltype(w);
      if (target == kProbe) return run(Perturb<P, W, P, kNoise>{});
      if (geometry == kAdaptive) return run(Perturb<P, W, G, kAdaptive>{});
      if (geometry == kFisher) return run(Perturb<P, W, G, kFisher>{});
      return run(Perturb<P, W, G, kEuclidean>{});
    });
  });
}

// What update_ was called with, checked.
struct UpdateCall {
  Tensor table;
  Plan plan;
  const double* groups;
  double* scalars;
  double* flags;
  float* steps;
  int64_t base_rule;
  int evaluations, required, checked;
  bool has_backup, has_master, narrow_states, keep_point, count_skipped;
  int64_t rounding_seed;
};

// The kernels for one type of parameters and gradients.
template <typename Executor, typename P, typename G>
void update_typed(const UpdateCall& call) {
  with_rule(call.base_rule, [&](auto rule) {
    constexpr bool kHasStates = state_count(decltype(rule)::value) > 0;
    with_kept<P, kHasStates>(call.has_master, call.narrow_states, [&](auto w, auto s) {
      using Op = Update<P, decltype(w), decltype(s), G, decltype(rule)::value>;
      Executor::walk(Op{call.plan, call.groups, call.scalars, call.flags, call.steps,
                        call.evaluations, call.required, call.checked, call.has_backup,
                        call.keep_point, call.count_skipped, call.rounding_seed},
                     call.table);
    });
  });
}

template <typename Executor>
void update(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, ScalarType state_dtype, Tensor groups, Tensor scalars,
            Tensor flags, Tensor steps, int64_t base_rule, int64_t evaluations, int64_t required,
            int64_t checked, bool has_backup, bool has_master, bool keep_point, bool count_skipped,
            int64_t rounding_seed) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_tensor(steps, "steps", ScalarType::Float, plan.tensors);
  check_evaluations(evaluations, required, checked);
  check_precision(dtype, has_backup, has_master, false);  // only the device knows where they are
  check_states(dtype, state_dtype, rounding_seed);
  check_one_device(table, {&chunks, &groups, &scalars, &flags, &steps});
  check_apart({&scalars, &flags, &steps}, {&table, &chunks, &groups});
  const UpdateCall call{table,
                        plan,
                        group_rows,
                        scalar,
                        flag,
                        static_cast<float*>(steps.mutable_data_ptr()),
                        base_rule,
                        int(evaluations),
                        int(required),
                        int(checked),
                        has_backup,
                        has_master,
                        state_dtype == dtype,
                        keep_point,
                        count_skipped,
                        rounding_seed};
  with_dtypes(dtype, grad_dtype,
              [&](auto p, auto g) { update_typed<Executor, decltype(p), decltype(g)>(call); });
}

}  // namespace wsam_fused
