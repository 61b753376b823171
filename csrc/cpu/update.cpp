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
// backup   kBackup         read, only with has_backup
// state    kState1..3      read and written
// steps    -               float32, one per tensor: read, and 1 added where a rule was stepped
//
// Moves 8 elements per parameter with Adam, 6 with momentum. A tensor that lacks a required
// gradient is restored and not updated; a step with a norm that is not finite updates nothing.
#include <torch/csrc/stable/library.h>

#include "restore.h"

namespace wsam_fused {
namespace {

template <typename T>
struct UpdateArgs {
  T* p;
  const T* source;  // where w is restored from: p or the backup
  T* g[3];
  T* state[3];
  int64_t count;
  T scale;  // of the perturbation to be undone, 0 if source holds w itself
  Coefficients<T> coefficients;
  RuleScalars<T> rule;
};

template <typename T, BaseRule rule>
struct UpdateLoop {
  using Args = UpdateArgs<T>;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    // Everything by value: scalars read through a reference would not let the loop vectorise.
    T* const p = args.p;
    const T* const source = args.source;
    T* const g1 = args.g[0];
    T* const g2 = args.g[1];
    const T* const g3 = args.g[2];
    T* const s1 = args.state[0];
    T* const s2 = args.state[1];
    T* const s3 = args.state[2];
    const int64_t count = args.count;
    const T scale = args.scale;
    const Coefficients<T> c = args.coefficients;
    const RuleScalars<T> scalars = args.rule;
    constexpr int states = state_count(rule);
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      const T x1 = g1[i], x2 = g2[i], x3 = g3[i];
      const T from = source[i];
      const T w = scale != T(0) ? recomputed(from, x1, scale) : from;
      const T h = combined(c.h, x1, x2, x3);
      const T d = combined(c.d, x1, x2, x3);
      if constexpr (rule == kNone) {
        p[i] = w;
        g2[i] = d;  // first: without a second gradient, or a first one, they are one
        g1[i] = h;
      } else {
        T state[3] = {};
        if constexpr (states > 0) state[0] = s1[i];
        if constexpr (states > 1) state[1] = s2[i];
        if constexpr (states > 2) state[2] = s3[i];
        p[i] = fused_multiply_add(-scalars.lr, d, base_step<rule>(w, h, state, scalars));
        if constexpr (states > 0) s1[i] = state[0];
        if constexpr (states > 1) s2[i] = state[1];
        if constexpr (states > 2) s3[i] = state[2];
      }
    }
  }
};

// What is the same for all segments of one step.
struct Step {
  const double* groups;
  const double* scalars;
  const float* steps;
  int evaluations, required;
  Point at;
  bool has_backup, keep_point, skipped;
};

// The scalars of a tensor, kept for the next one: most neighbours are of one group and one age.
template <typename T, BaseRule rule>
struct TensorScalars {
  int64_t group = -1;
  float age = -1;
  T perturbation = 0;
  Coefficients<T> row{};
  RuleScalars<T> base{};

  void refresh(const Step& step, int64_t tensor_group, float tensor_age) {
    if (tensor_group == group && tensor_age == age) return;
    group = tensor_group;
    age = tensor_age;
    const double* const columns = step.groups + group * kGroupColumns;
    perturbation = scale_at<T>(step.at, step.scalars, columns);
    row = coefficients<T>(columns, step.scalars);
    base = rule_scalars<rule, T>(columns, double(age) + 1.0);
  }
};

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
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      const bool update = !step.skipped && has_gradients(plan, tensor, step.required);
      const bool perturbed = step.at != kWeights && plan.at(kGrad1, tensor);
      if (!update && !perturbed) return;
      scalars.refresh(step, plan.at(kGroup, tensor), step.steps[tensor]);
      if (update) {
        update_loop(segment_args<T, rule>(plan, step, scalars, perturbed, tensor, begin, end));
      } else {
        restore_loop({segment<T>(plan, kParam, tensor, begin),
                      segment<T>(plan, kGrad1, tensor, begin),
                      segment<T>(plan, kBackup, tensor, begin), end - begin, scalars.perturbation});
      }
    });
  });
}

template <typename T>
void update_with_rule(int64_t base_rule, const Plan& plan, const Step& step) {
  switch (base_rule) {
    case kNone:
      return update_list<T, kNone>(plan, step);
    case kSgd:
      return update_list<T, kSgd>(plan, step);
    case kMomentum:
      return update_list<T, kMomentum>(plan, step);
    case kAdam:
      return update_list<T, kAdam>(plan, step);
    case kAmsgrad:
      return update_list<T, kAmsgrad>(plan, step);
    default:
      STD_TORCH_CHECK(false, "base_rule is ", base_rule, ", expected 0 to ", int(kAmsgrad));
  }
}

void update(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
            ScalarType grad_dtype, Tensor groups, Tensor scalars, Tensor flags, Tensor steps,
            int64_t base_rule, int64_t evaluations, int64_t required, int64_t checked,
            bool has_backup, bool keep_point, bool count_skipped) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  check_tensor(steps, "steps", ScalarType::Float, plan.tensors);
  check_evaluations(evaluations, required);
  double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  float* const step_counts = static_cast<float*>(steps.mutable_data_ptr());
  const bool skipped = !all_finite(scalar, int(checked));
  const Step step{checked_groups(groups), scalar,     step_counts, int(evaluations), int(required),
                  Point(int(flag[kAt])),  has_backup, keep_point,  skipped};
  with_dtype(dtype, grad_dtype,
             [&](auto zero) { update_with_rule<decltype(zero)>(base_rule, plan, step); });
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
