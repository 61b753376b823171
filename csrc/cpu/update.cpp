// update_: restore w, form h and d, step the base rule, subtract lr * d; one pass over memory.
//
//   w  = fma(-s, g1, p), or the backup, or p itself where it was not perturbed or with keep_point
//   h  = sum of h_k g_k,   d = sum of d_k g_k       (sign and clipping are in the coefficients)
//   w' = rule(w, h; state) - lr d
//
// operand  row             access
// p        kParam          read (where w is recomputed or p itself) and written
// g1..g3   kGrad1..kGrad3  as many as evaluations; read; written by the rule `none`: h into g1, d
//                          into g2; h into g2 where there is no g1
// backup   kBackup         read, only with has_backup; with has_master float32, read and written
// state    kState1..3      read and written
// steps    -               float32, one per tensor: read, and 1 added where a rule was stepped
//
// Moves 8 elements per parameter with Adam, 6 with momentum. A tensor that lacks a required
// gradient is restored and not updated; a step with a norm that is not finite updates nothing.
#include <torch/csrc/stable/library.h>

#include "check_table.h"
#include "update_low.h"

namespace wsam_fused {
namespace {

template <typename T, BaseRule rule>
UpdateArgs<T> segment_args(const Plan& plan, const Step& step,
                           const TensorScalars<T, rule>& scalars, bool perturbed, int64_t tensor,
                           int64_t begin, int64_t end) {
  UpdateArgs<T> args{};
  args.count = end - begin;
  args.p = segment<T>(plan, kParam, tensor, begin);
  T* const backup = segment<T>(plan, kBackup, tensor, begin);
  const bool restores = perturbed && !step.keep_point;
  args.source = restores && step.has_backup ? backup : args.p;
  args.scale = restores && !step.has_backup ? scalars.perturbation : T(0);
  args.coefficients = scalars.row;
  args.rule = scalars.base;
  // A gradient that is not used is read from the place of one that is, and moves nothing.
  for (int k = 0; k < 3; ++k) {
    args.g[k] = k < step.evaluations ? segment<T>(plan, TableRow(kGrad1 + k), tensor, begin)
                                     : args.g[k - 1];
    args.state[k] = segment<T>(plan, TableRow(kState1 + k), tensor, begin);
  }
  const bool g1_used = (rule == kNone && args.g[0]) || args.scale != T(0) ||
                       scalars.row.h[0] != T(0) || scalars.row.d[0] != T(0);
  if (!g1_used) args.g[0] = args.g[1];
  return args;
}

template <typename T, BaseRule rule>
void update_list(const Plan& plan, const Step& step) {
  const auto update_loop = CompiledLoop<UpdateLoop<T, rule>>::choose();
  const auto restore_loop = chosen_restore_loop<T>(step.has_backup);
  for_each_chunk(plan, [&](int64_t chunk) {
    TensorScalars<T, rule> scalars;
    const auto visit = [&](int64_t tensor, int64_t begin, int64_t end, bool update,
                           bool perturbed) {
      scalars.refresh(step, plan.at(kGroup, tensor), step.steps[tensor]);
      if (update) {
        update_loop(segment_args<T, rule>(plan, step, scalars, perturbed, tensor, begin, end));
      } else {
        restore_loop({segment<T>(plan, kParam, tensor, begin),
                      segment<T>(plan, kGrad1, tensor, begin),
                      segment<T>(plan, kBackup, tensor, begin), end - begin, scalars.perturbation});
      }
    };
    for_each_stepped_segment(plan, step, chunk, visit);
  });
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

// The addresses that for_each_stepped_segment() leads to.
void check_stepped(const Plan& plan, const Step& step, int64_t base_rule, int64_t groups) {
  int states = 0;
  with_rule(base_rule, [&](auto rule) { states = state_count(rule()); });
  check_table(plan, groups, [&](int64_t tensor) {
    const bool updates = !step.skipped && has_gradients(plan, tensor, step.required);
    const bool perturbed = step.at != kWeights && plan.at(kGrad1, tensor);
    const bool reads_backup = step.has_master || (perturbed && step.has_backup);
    if ((updates || perturbed) && reads_backup) check_address(plan, kBackup, "backup", tensor);
    if (!updates) return;
    for (int s = 0; s < states; ++s) {
      check_address(plan, TableRow(kState1 + s), "state", tensor);
    }
    const double* const group = step.groups + plan.at(kGroup, tensor) * kGroupColumns;
    const bool first_is_used = group[kH1] != 0 || group[kD1] != 0 || step.evaluations == 1;
    for (int k = first_is_used ? 0 : 1; k < step.evaluations; ++k) {
      check_address(plan, TableRow(kGrad1 + k), "gradient", tensor);
    }
  });
}

void update(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, ScalarType state_dtype, Tensor groups, Tensor scalars,
            Tensor flags, Tensor steps, int64_t base_rule, int64_t evaluations, int64_t required,
            int64_t checked, bool has_backup, bool has_master, bool keep_point, bool count_skipped,
            int64_t rounding_seed) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  check_tensor(steps, "steps", ScalarType::Float, plan.tensors);
  check_evaluations(evaluations, required, checked);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  float* const step_counts = static_cast<float*>(steps.mutable_data_ptr());
  const bool skipped = !all_finite(scalar, int(checked));
  check_apart({&scalars, &flags, &steps}, {&table, &chunks, &groups});
  const Point at = checked_point(flag[kAt], has_backup);
  check_precision(dtype, has_backup, has_master, at != kWeights);
  check_states(dtype, state_dtype, rounding_seed);
  check_grad_dtype(dtype, grad_dtype);
  const Step step{checked_groups(groups),
                  scalar,
                  step_counts,
                  int(evaluations),
                  int(required),
                  at,
                  has_backup,
                  has_master,
                  keep_point,
                  skipped,
                  state_dtype != dtype || !is_low(dtype),
                  rounding_seed};
  check_stepped(plan, step, base_rule, groups.size(0));
  with_rule(base_rule, [&](auto rule) {
    if (is_low(dtype)) {
      with_low(dtype, [&](auto kind) { update_low_list<kind(), rule()>(plan, step); });
    } else {
      with_dtype(dtype, [&](auto zero) { update_list<decltype(zero), rule()>(plan, step); });
    }
  });
  flag[kAt] = kWeights;
  if (skipped) {
    scalar[kSkipped] += count_skipped ? 1.0 : 0.0;
    return;
  }
  if (base_rule == kNone) return;
  for (int64_t tensor = 0; tensor < plan.tensors; ++tensor) {
    if (has_gradients(plan, tensor, step.required)) step_counts[tensor] += 1.0f;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) { library.impl("update_", TORCH_BOX(&update)); }

}  // namespace wsam_fused
