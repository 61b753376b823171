// update_ on a GPU: what cpu/update.cpp states. Parameters, gradients and states may be of low
// precision; the arithmetic is float32 (float64 for float64 parameters), and every result is
// rounded once, when it is stored.
//
// Moves 8 elements per parameter with Adam (reads w, g1, g2 and two states, writes w and these), 6
// with momentum, one more with float32 weights besides p.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "perturb.h"

namespace wsam_fused {

using torch::headeronly::BFloat16;

// W is the type of w where it is kept: that of p, or float32 besides a p of 16 bits; S is that of
// the states. A type for each, and no branch where they are loaded: see vector.h.
template <typename P, typename W, typename S, typename G, BaseRule rule>
struct Update {
  using T = typename ComputeType<P>::type;
  static constexpr bool kHasMaster = !std::is_same_v<P, W>;
  static constexpr int kStates = state_count(rule);
  // With two states a vector has four elements at most: for eight there are too few registers.
  static constexpr size_t kOfState = kStates > 1 ? sizeof(float) : kStates > 0 ? sizeof(S) : 0;
  static constexpr int kWidth = vector_width(kOfState > sizeof(W) ? kOfState : sizeof(W));
  // 4 of 8: at most 64 registers, half of the threads that a multiprocessor holds.
  static constexpr int kBlocksPerProcessor = sizeof(T) == sizeof(float) ? 4 : 2;

  enum Work : int { kLeave = 0, kRestore, kUpdate };

  struct Slot {
    Place place;
    P* p;
    W* source;  // where w is: p, the backup or the float32 weights
    G* g[3];
    S* state[3];
    int64_t group;
    float age;
    uint32_t chance;  // see chance_at()
    T perturbation;   // of the group
    T scale;          // of the perturbation to be undone, 0 if source holds w itself
    Coefficients<T> row;
    RuleScalars<T> base;
    Work work;
    bool aligned;
    bool keeps_point;  // with float32 weights: the update starts from p

    // Shared memory begins with anything; fill() keeps scalars that fit the next tensor too.
    WSAM_HOST_DEVICE void forget() { group = -1; }
  };

  Plan plan;
  const double* groups;
  double* scalars;
  double* flags;
  float* steps;
  int evaluations, required, checked;
  bool has_backup, keep_point, count_skipped;
  int64_t rounding_seed;

  struct Step {
    bool active, skipped;
    Point at;
  };

  WSAM_HOST_DEVICE Step begin() const {
    const bool skipped = !all_finite(scalars, checked);
    const Point at = Point(int(flags[kAt]));
    return {at != kWeights || !skipped, skipped, at};
  }

  WSAM_HOST_DEVICE void fill(Slot& slot, int64_t chunk, int64_t tensor, const Step& step) const {
    const bool perturbed = step.at != kWeights && plan.at(kGrad1, tensor);
    const bool update = !step.skipped && has_gradients(plan, tensor, required);
    slot.place = place_of(plan, chunk, tensor);
    slot.work = update ? kUpdate : perturbed ? kRestore : kLeave;
    if (slot.work == kLeave) return;
    fill_scalars(slot, plan.at(kGroup, tensor), steps[tensor], step.at);
    slot.keeps_point = kHasMaster && update && keep_point && step.at != kWeights;
    if (rounding_seed >= 0) {
      slot.chance = chance_of_tensor(rounding_seed, plan.at(kKey, tensor), slot.age);
    }
    fill_addresses(slot, tensor, perturbed && !(update && keep_point));
  }

  WSAM_HOST_DEVICE void work(const Window& window, const Slot* slots, int thread) const {
    const auto visit = [&](const Slot& slot, int begin, int end, int stride) {
      if (slot.work == kLeave) return;
      for (int i = begin; i < end; i += stride) {
        for_each_piece<kWidth>(i, end, slot.aligned, [&](auto piece) {
          if (slot.work == kUpdate) {
            update(slot, piece);
          } else {
            restore(slot.p, slot.source, slot.g[0], slot.scale, piece);
          }
        });
      }
    };
    for_each_share<kWidth>(window, slots, thread, visit);
  }

  // Run by the block that is last, when no other reads what is written here.
  WSAM_HOST_DEVICE void finish(int thread, const Step& step) const {
    if (rule != kNone && !step.skipped) count_step(thread);
    if (thread != 0) return;
    flags[kAt] = kWeights;
    if (step.skipped && count_skipped) scalars[kSkipped] += 1.0;
  }

 private:
  // Several tensors at once, because nothing else is going on that could hide the latency.
  WSAM_HOST_DEVICE void count_step(int thread) const {
    constexpr int kAtOnce = 4;
    for (int64_t first = thread; first < plan.tensors; first += kAtOnce * kThreads) {
      float ages[kAtOnce];
      bool updated[kAtOnce];
      WSAM_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t tensor = smaller(first + k * kThreads, plan.tensors - 1);
        ages[k] = steps[tensor];
        updated[k] = has_gradients(plan, tensor, required);
      }
      WSAM_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t tensor = first + k * kThreads;
        if (tensor < plan.tensors && updated[k]) steps[tensor] = ages[k] + 1.0f;
      }
    }
  }

  WSAM_HOST_DEVICE void fill_scalars(Slot& slot, int64_t group, float age, Point at) const {
    if (slot.group == group && slot.age == age) return;
    const double* const columns = groups + group * kGroupColumns;
    slot.group = group;
    slot.age = age;
    slot.perturbation = scale_at<T>(at, scalars, columns);
    slot.row = coefficients<T>(columns, scalars);
    slot.base = rule_scalars<rule, T>(columns, double(age) + 1.0);
  }

  WSAM_HOST_DEVICE void fill_addresses(Slot& slot, int64_t tensor, bool restores) const {
    slot.p = start<P>(plan, kParam, tensor, slot.place);
    if constexpr (kHasMaster) {
      slot.source = start<W>(plan, kBackup, tensor, slot.place);
    } else {
      slot.source = restores && has_backup ? start<W>(plan, kBackup, tensor, slot.place) : slot.p;
    }
    slot.scale = restores && !has_backup ? slot.perturbation : T(0);
    bool aligned = is_aligned<kWidth>(slot.p) && is_aligned<kWidth>(slot.source);
    // A gradient that is not used is read from the place of one that is, and moves nothing.
    for (int k = 0; k < 3; ++k) {
      const bool there = k == 0 || (k < evaluations && slot.work == kUpdate);
      slot.g[k] = there ? start<G>(plan, TableRow(kGrad1 + k), tensor, slot.place) : slot.g[k - 1];
      aligned = aligned && is_aligned<kWidth>(slot.g[k]);
    }
    const bool first_used = (rule == kNone && slot.g[0]) || slot.scale != T(0) ||
                            slot.row.h[0] != T(0) || slot.row.d[0] != T(0);
    if (!first_used) slot.g[0] = slot.g[1];
    for (int k = 0; k < kStates; ++k) {
      slot.state[k] = start<S>(plan, TableRow(kState1 + k), tensor, slot.place);
      aligned = aligned && is_aligned<kWidth>(slot.state[k]);
    }
    slot.aligned = aligned;
  }

  template <int width>
  WSAM_HOST_DEVICE void update(const Slot& slot, const Piece<width>& piece) const {
    // At most two states are loaded with the gradients: a third one would not fit the registers.
    constexpr int kEarly = kStates < 2 ? kStates : 2;
    T w[width], h[width], d[width], state[3][width] = {};
    {
      T x1[width], x2[width], x3[width] = {};
      load(slot.source, piece, w);
      load(slot.g[0], piece, x1);
      load(slot.g[1], piece, x2);
      if (evaluations == 3) load(slot.g[2], piece, x3);
      WSAM_UNROLL
      for (int s = 0; s < kEarly; ++s) load(slot.state[s], piece, state[s]);
      if (kHasMaster && slot.keeps_point) load(slot.p, piece, w);
      WSAM_UNROLL
      for (int k = 0; k < width; ++k) {
        if (slot.scale != T(0)) w[k] = recomputed(w[k], x1[k], slot.scale);
        h[k] = combined(slot.row.h, x1[k], x2[k], x3[k]);
        d[k] = combined(slot.row.d, x1[k], x2[k], x3[k]);
      }
    }
    if constexpr (rule == kNone) {
      store(slot.g[1], piece, d);  // first: without g2, or without g1, they are one
      store(slot.g[0], piece, h);
    } else {
      if constexpr (kEarly < kStates) hold_back_loads();
      WSAM_UNROLL
      for (int s = kEarly; s < kStates; ++s) load(slot.state[s], piece, state[s]);
      step_rule(slot, w, h, d, state);
    }
    round(slot, slot.p, 0, piece, w);
    if constexpr (kHasMaster) store(slot.source, piece, w);
    WSAM_UNROLL
    for (int s = 0; s < kStates; ++s) round(slot, slot.state[s], s + 1, piece, state[s]);
  }

  // Stores the operand of this number (see chance_at()): to nearest, or by chance.
  template <int width, typename Storage>
  WSAM_HOST_DEVICE void round(const Slot& slot, Storage* to, uint32_t operand,
                              const Piece<width>& piece, const T (&values)[width]) const {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      if (rounding_seed >= 0) {
        const uint32_t first = uint32_t(slot.place.begin) + uint32_t(piece.begin);
        Packed<BFloat16, width> packed;
        WSAM_UNROLL
        for (int k = 0; k < width; ++k) {
          const uint32_t chance = chance_at(slot.chance, operand, first + uint32_t(k));
          packed.values[k].x = rounded_by_chance(bits_of(values[k]), chance);
        }
        return store_packed(in_global_memory(to + piece.begin), packed);
      }
    }
    store(to, piece, values);
  }

  template <int width>
  static WSAM_HOST_DEVICE void step_rule(const Slot& slot, T (&w)[width], const T (&h)[width],
                                         const T (&d)[width], T (&state)[3][width]) {
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) {
      T mine[3] = {state[0][k], state[1][k], state[2][k]};
      w[k] = fused_multiply_add(-slot.base.lr, d[k], base_step<rule>(w[k], h[k], mine, slot.base));
      WSAM_UNROLL
      for (int s = 0; s < kStates; ++s) state[s][k] = mine[s];
    }
  }
};

}  // namespace wsam_fused
