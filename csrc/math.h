// The arithmetic of the native backends, one scalar at a time: shared by the CPU loops and the GPU
// kernels. The eager reference (wsam_fused/backends/eager.py) states the same formulas.
//
// Products that are added are written as fma: the compiler may not contract anything by itself
// (-ffp-contract=off, -fmad=false), so every instruction set and every head or tail of a vector
// loop rounds alike, and the restore undoes the perturbation with the same operation.
#pragma once

#include <cfloat>
#include <cmath>

#include "plan.h"

namespace wsam_fused {

#if defined(__CUDA_ARCH__)
WSAM_HOST_DEVICE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
WSAM_HOST_DEVICE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
WSAM_HOST_DEVICE float square_root(float x) { return ::sqrtf(x); }
WSAM_HOST_DEVICE double square_root(double x) { return ::sqrt(x); }
WSAM_HOST_DEVICE bool is_finite(double x) { return ::isfinite(x); }
#else
WSAM_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
WSAM_HOST_DEVICE double fused_multiply_add(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
WSAM_HOST_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
WSAM_HOST_DEVICE double square_root(double x) { return __builtin_sqrt(x); }
WSAM_HOST_DEVICE bool is_finite(double x) { return std::isfinite(x); }
#endif
template <typename T>
WSAM_HOST_DEVICE T larger(T a, T b) {
  return a > b || a != a ? a : b;  // a NaN stays, as in torch.maximum
}

// ---- the perturbation -------------------------------------------------------------------------

// The metric M of a geometry: e = rho * M g / sqrt(sum of M g^2). reduce and perturb both use it.
template <Geometry geometry, typename T>
WSAM_HOST_DEVICE T metric(T w) {
  if constexpr (geometry == kAdaptive) return w * w;
  return T(1);
}

// rho / (norm + eps), and 0 where the norm is 0: there is no direction to go. A scale beyond the
// range of T (a vanishing norm with eps = 0) is held at its largest finite value.
template <typename T>
WSAM_HOST_DEVICE T ascent_scale(double metric_sq, const double* group) {
  const double largest = sizeof(T) == sizeof(float) ? double(FLT_MAX) : DBL_MAX;
  const double norm = square_root(metric_sq);
  const double scale = norm > 0 ? group[kRho] / (norm + group[kAscentEps]) : 0.0;
  return T(group[kSign] * (scale < largest ? scale : largest));
}

template <Geometry geometry, typename T>
WSAM_HOST_DEVICE T perturbed(T w, T g, T scale) {
  return fused_multiply_add(scale, metric<geometry>(w) * g, w);
}

// Only for the Euclidean geometry: the adaptive metric needs the w that is being looked for.
template <typename T>
WSAM_HOST_DEVICE T recomputed(T p, T g, T scale) {
  return fused_multiply_add(-scale, g, p);
}

// ---- the coefficients of a step ---------------------------------------------------------------

// min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; a negative max_norm is none.
WSAM_HOST_DEVICE double clip_factor(double sum_sq, double max_norm) {
  if (max_norm < 0) return 1.0;
  const double factor = max_norm / (square_root(sum_sq) + 1e-6);
  return factor < 1.0 ? factor : 1.0;
}

template <typename T>
struct Coefficients {
  T h[3];
  T d[3];
};

template <typename T>
WSAM_HOST_DEVICE Coefficients<T> coefficients(const double* group, const double* scalars) {
  const double max_norm = group[kMaxNorm];
  const double clip[3] = {clip_factor(scalars[kGrad1Sq], max_norm),
                          clip_factor(scalars[kGrad2Sq], max_norm), 1.0};
  Coefficients<T> c{};
  for (int k = 0; k < 3; ++k) {
    const double factor = group[kSign] * clip[k];
    c.h[k] = T(group[kH1 + k] * factor);
    c.d[k] = T(group[kD1 + k] * factor);
  }
  return c;
}

// A step whose norms are not all finite updates nothing.
WSAM_HOST_DEVICE bool all_finite(const double* scalars, bool check_second) {
  return is_finite(scalars[kMetricSq]) && is_finite(scalars[kGrad1Sq]) &&
         (!check_second || is_finite(scalars[kGrad2Sq]));
}

// A coefficient of 0 takes the gradient out: 0 * inf must not poison the sum.
template <typename T>
WSAM_HOST_DEVICE T weighted(T coefficient, T g, T sum) {
  return coefficient != T(0) ? fused_multiply_add(coefficient, g, sum) : sum;
}

template <typename T>
WSAM_HOST_DEVICE T combined(const T* c, T g1, T g2, T g3) {
  return weighted(c[0], g1, weighted(c[1], g2, weighted(c[2], g3, T(0))));
}

// ---- the base rules ---------------------------------------------------------------------------

// What a rule needs besides h, formed once per tensor in double.
template <typename T>
struct RuleScalars {
  T lr, l2, keep;           // keep = 1 - lr * decay
  T momentum, damped;       // damped = 1 - dampening, 1 in the first step
  T beta2, rest1, rest2;    // rest = 1 - beta
  T step_size, root_scale;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  T eps;
  T nesterov;  // 0 or 1, of type T: a bool is not vectorised (checked in the assembly)
};

// x^t for a whole t >= 0, by squaring: the same bits on every device, which pow() does not promise.
WSAM_HOST_DEVICE double power(double x, double t) {
  double result = 1.0;
  for (uint32_t rest = uint32_t(t); rest > 0; rest /= 2) {
    if (rest % 2) result *= x;
    x *= x;
  }
  return result;
}

template <BaseRule rule, typename T>
WSAM_HOST_DEVICE RuleScalars<T> rule_scalars(const double* group, double t) {
  RuleScalars<T> s{};
  s.lr = T(group[kLr]);
  s.l2 = T(group[kL2]);
  s.keep = T(1.0 - group[kLr] * group[kDecay]);
  if constexpr (rule == kMomentum) {
    s.momentum = T(group[kBeta1]);
    s.damped = t > 1 ? T(1.0 - group[kBeta2]) : T(1);
    s.nesterov = T(group[kNesterov]);
  }
  if constexpr (rule == kAdam || rule == kAmsgrad) {
    s.beta2 = T(group[kBeta2]);
    s.rest1 = T(1.0 - group[kBeta1]);
    s.rest2 = T(1.0 - group[kBeta2]);
    s.step_size = T(group[kLr] / (1.0 - power(group[kBeta1], t)));
    s.root_scale = T(1.0 / square_root(1.0 - power(group[kBeta2], t)));
    s.eps = T(group[kRuleEps]);
  }
  return s;
}

constexpr int state_count(BaseRule rule) {
  return rule == kAmsgrad ? 3 : rule == kAdam ? 2 : rule == kMomentum ? 1 : 0;
}

// One step of the base rule: the new w, with the state changed in place. algorithms: SGD with
// momentum, dampening and Nesterov; Adam (L2 in the gradient) and AdamW (decay of w) are one rule.
template <BaseRule rule, typename T>
WSAM_HOST_DEVICE T base_step(T w, T h, T* state, const RuleScalars<T>& s) {
  const T u = fused_multiply_add(s.l2, w, h);
  if constexpr (rule == kSgd) {
    return fused_multiply_add(-s.lr, u, w);
  } else if constexpr (rule == kMomentum) {
    state[0] = fused_multiply_add(s.momentum, state[0], s.damped * u);
    const T step = s.nesterov != T(0) ? fused_multiply_add(s.momentum, state[0], u) : state[0];
    return fused_multiply_add(-s.lr, step, w);
  } else {
    state[0] = fused_multiply_add(s.rest1, u - state[0], state[0]);
    state[1] = fused_multiply_add(s.rest2 * u, u, s.beta2 * state[1]);
    T second = state[1];
    if constexpr (rule == kAmsgrad) second = state[2] = larger(state[2], state[1]);
    const T root = fused_multiply_add(square_root(second), s.root_scale, s.eps);
    return w * s.keep - s.step_size * (state[0] / root);
  }
}

}  // namespace wsam_fused
