// The arithmetic of the native backends, one scalar at a time: shared by the CPU loops and the GPU
// kernels. The eager reference (wsam_fused/backends/eager.py) states the same formulas.
//
// Products that are added are written as fma: the compiler may not contract anything by itself
// (-ffp-contract=off, -fmad=false), so every instruction set and every head or tail of a vector
// loop rounds alike, and the restore undoes the perturbation with the same operation.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "plan.h"

namespace wsam_fused {

#if defined(__CUDA_ARCH__)
WSAM_HOST_DEVICE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
WSAM_HOST_DEVICE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
WSAM_HOST_DEVICE float square_root(float x) { return ::sqrtf(x); }
WSAM_HOST_DEVICE double square_root(double x) { return ::sqrt(x); }
WSAM_HOST_DEVICE bool is_finite(double x) { return ::isfinite(x); }
WSAM_HOST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
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
WSAM_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
#endif
template <typename T>
WSAM_HOST_DEVICE T larger(T a, T b) {
  return a > b || a != a ? a : b;  // a NaN stays, as in torch.maximum
}

// ---- the perturbation -------------------------------------------------------------------------

// The metric M of a geometry: e = rho M g / sqrt(sum of M g^2). reduce and perturb both use it.
template <Geometry geometry, typename T>
WSAM_HOST_DEVICE T metric(T w, T g, T eta) {
  if constexpr (geometry == kAdaptive) {
    const T size = (w < T(0) ? -w : w) + eta;
    return size * size;
  } else if constexpr (geometry == kFisher) {
    return T(1) / fused_multiply_add(eta * g, g, T(1));
  }
  return T(1);
}

// The eta of a metric for gradients that are multiplied by a loss scale.
WSAM_HOST_DEVICE double scaled_eta(int64_t geometry, const double* scalars, const double* group) {
  const double inverse = geometry == kFisher ? scalars[kInvScale1] : 1.0;
  return group[kEta] * inverse * inverse;
}

// radius / (norm + eps), and 0 where the norm is 0: there is no direction to go. A scale beyond the
// range of T (a vanishing norm with eps = 0) is held at its largest finite value. It goes with the
// gradient in memory, which is the gradient times a loss scale.
template <typename T>
WSAM_HOST_DEVICE T step_to_radius(const double* scalars, double radius, const double* group) {
  const double largest = sizeof(T) == sizeof(float) ? double(FLT_MAX) : DBL_MAX;
  const double inverse = scalars[kInvScale1];
  const double norm = square_root(scalars[kMetricSq]) * inverse;
  const double scale = norm > 0 ? radius / (norm + group[kAscentEps]) * inverse : 0.0;
  return T(group[kSign] * (scale < largest ? scale : largest));
}

// What M g1, or the noise, is multiplied by to get from w to a point.
template <typename T>
WSAM_HOST_DEVICE T scale_at(Point point, const double* scalars, const double* group) {
  if (point == kAscent) return step_to_radius<T>(scalars, group[kRho], group);
  if (point == kDescent) return -step_to_radius<T>(scalars, group[kRhoDescent], group);
  return point == kProbe ? T(group[kDelta]) : T(0);
}

// Without a finite norm there is no way to the points that it scales. The probe is entered from w
// and left to w.
WSAM_HOST_DEVICE bool can_move(Point at, Point target, const double* scalars) {
  const bool by_gradient = target == kAscent || target == kDescent;
  const bool by_noise = at == kProbe || target == kProbe;
  return at != target && (!by_gradient || is_finite(scalars[kMetricSq])) &&
         (!by_noise || at == kWeights || target == kWeights);
}

template <Geometry geometry, typename T>
WSAM_HOST_DEVICE T perturbed(T w, T g, T scale, T eta) {
  return fused_multiply_add(scale, metric<geometry>(w, g, eta) * g, w);
}

// Only for the Euclidean geometry: the adaptive metric needs the w that is being looked for.
template <typename T>
WSAM_HOST_DEVICE T recomputed(T p, T g, T scale) {
  return fused_multiply_add(-scale, g, p);
}

// ---- noise --------------------------------------------------------------------------------------

// A 32-bit hash with little bias: C. Wellons, "Prospecting for Hash Functions" (lowbias32).
WSAM_HOST_DEVICE uint32_t hashed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Noise is never stored: every operation makes it again from the seed, the tensor's key and the
// element's index.
WSAM_HOST_DEVICE uint32_t noise_of_tensor(double seed, int64_t key) {
  const uint64_t whole = uint64_t(seed);
  return hashed(hashed(hashed(uint32_t(whole)) + uint32_t(whole >> 32)) + uint32_t(key));
}

// -1 or 1 for element `index` of a stretch that begins with word `first_word` of 32 elements.
template <typename T>
WSAM_HOST_DEVICE T noise_at(uint32_t of_tensor, uint32_t first_word, uint32_t index) {
  const uint32_t word = hashed(of_tensor + (first_word + (index >> 5)) * 0x9e3779b9u);
  return (word >> (index & 31)) & 1 ? T(1) : T(-1);
}

// ---- bfloat16 by chance -------------------------------------------------------------------------

// 16 bits that tell to which neighbour an element is rounded: made again from a seed, the tensor's
// key and age, which operand it is of (0 for p, 1 to 3 for the states), and the element's index.
WSAM_HOST_DEVICE uint32_t chance_of_tensor(int64_t seed, int64_t key, float age) {
  return hashed(noise_of_tensor(double(seed), key) + uint32_t(age));
}
WSAM_HOST_DEVICE uint32_t chance_at(uint32_t of_tensor, uint32_t operand, uint32_t index) {
  return hashed(of_tensor + operand * 0x85ebca6bu + index * 0x9e3779b9u) >> 16;
}

// The bits of a float32 rounded to bfloat16, up with the probability that the value asks for. What
// is not finite stays so.
WSAM_HOST_DEVICE uint16_t rounded_by_chance(uint32_t bits, uint32_t chance) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t quiet = (bits & 0x007fffffu) != 0 ? 0x00400000u : 0u;
  return uint16_t((finite ? bits + chance : bits | quiet) >> 16);
}

// ---- the coefficients of a step ---------------------------------------------------------------

// min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; a negative max_norm is none.
WSAM_HOST_DEVICE double clip_factor(double norm, double max_norm) {
  if (max_norm < 0) return 1.0;
  const double factor = max_norm / (norm + 1e-6);
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
  Coefficients<T> c{};
  for (int k = 0; k < 3; ++k) {
    const double inverse = scalars[kInvScale1 + k];
    const double norm = square_root(scalars[kGrad1Sq + k]) * inverse;
    const double factor = group[kSign] * clip_factor(norm, max_norm) * inverse;
    c.h[k] = T(group[kH1 + k] * factor);
    c.d[k] = T(group[kD1 + k] * factor);
  }
  return c;
}

// A step whose norms are not all finite updates nothing. Bit k of `checked`: the norm of gradient
// k + 1 is known.
WSAM_HOST_DEVICE bool all_finite(const double* scalars, int checked) {
  bool all = scalars[kFoundInf] == 0 && (!(checked & 1) || is_finite(scalars[kMetricSq]));
  for (int k = 0; k < 3; ++k) all &= !(checked >> k & 1) || is_finite(scalars[kGrad1Sq + k]);
  return all;
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
