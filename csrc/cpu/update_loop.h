// What update_ does to one segment whose operands are all of one type, and what it needs to know.
#pragma once

#include "restore.h"

namespace wsam_fused {

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
  bool has_backup, has_master, keep_point, skipped;
  bool wide_states;
  int64_t rounding_seed;
};

// Calls visit(tensor, begin, end, update, perturbed) for every segment that is updated or put back.
template <typename Visit>
void for_each_stepped_segment(const Plan& plan, const Step& step, int64_t chunk,
                              const Visit& visit) {
  for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
    const bool update = !step.skipped && has_gradients(plan, tensor, step.required);
    const bool perturbed = step.at != kWeights && plan.at(kGrad1, tensor);
    if (update || perturbed) visit(tensor, begin, end, update, perturbed);
  });
}

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

}  // namespace wsam_fused
