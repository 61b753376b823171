// update_ for parameters of 16 bits: block by block through the loops for float32.
#pragma once

#include "low_precision.h"
#include "update_loop.h"

namespace wsam_fused {

// The operands of one segment, null where there is none.
template <Low kind, BaseRule rule>
class LowSegment {
 public:
  LowSegment(const Plan& plan, const Step& step, const Conversions<kind>& convert, int64_t tensor,
             int64_t begin)
      : step_(step), convert_(convert), first_(uint32_t(begin)) {
    p_ = segment<uint16_t>(plan, kParam, tensor, begin);
    backup_ = step.has_master ? nullptr : segment<uint16_t>(plan, kBackup, tensor, begin);
    master_ = step.has_master ? segment<float>(plan, kBackup, tensor, begin) : nullptr;
    for (int k = 0; k < step.evaluations; ++k) {
      g_[k] = segment<uint16_t>(plan, TableRow(kGrad1 + k), tensor, begin);
    }
    for (int s = 0; s < state_count(rule); ++s) {
      const TableRow row = TableRow(kState1 + s);
      if (step.wide_states) {
        wide_state_[s] = segment<float>(plan, row, tensor, begin);
      } else {
        state_[s] = segment<uint16_t>(plan, row, tensor, begin);
      }
    }
    if (step.rounding_seed >= 0) {
      chance_ = chance_of_tensor(step.rounding_seed, plan.at(kKey, tensor), step.steps[tensor]);
    }
  }

  void restore(int64_t total) const {
    if (master_) return convert_.narrow(master_, p_, total);
    std::memcpy(p_, backup_, size_t(total) * sizeof *p_);
  }

  // `loop` steps `total` elements; `restores`: p is not at w.
  template <typename Loop>
  void update(const Loop& loop, const TensorScalars<float, rule>& scalars, bool restores,
              int64_t total) const {
    UpdateArgs<float> args{};
    args.coefficients = scalars.row;
    args.rule = scalars.base;
    // A gradient that is not used is read from the place of one that is, and moves nothing.
    const uint16_t* g[3] = {g_[0], step_.evaluations > 1 ? g_[1] : g_[0], nullptr};
    g[2] = step_.evaluations > 2 ? g_[2] : g[1];
    const bool g1_used =
        (rule == kNone && g[0]) || scalars.row.h[0] != 0.0f || scalars.row.d[0] != 0.0f;
    if (!g1_used) g[0] = g[1];
    const uint16_t* const start = restores && !master_ ? backup_ : p_;
    for_each_block(total, [&](int64_t first, int64_t count) {
      step_block(loop, args, g, start, restores, first, count);
    });
  }

 private:
  template <typename Loop>
  void step_block(const Loop& loop, UpdateArgs<float> args, const uint16_t* const* g,
                  const uint16_t* start, bool restores, int64_t first, int64_t count) const {
    float w[kBlock], wide_g[3][kBlock], states[3][kBlock];
    args.count = count;
    args.p = master_ ? master_ + first : w;
    args.source = args.p;
    if (!master_ || (step_.keep_point && step_.at != kWeights)) {
      convert_.widen(start + first, w, count);
      args.source = w;
    }
    for (int k = 0; k < 3; ++k) {
      args.g[k] = wide_g[k];
      for (int before = 0; before < k; ++before) {
        if (g[before] == g[k]) args.g[k] = args.g[before];
      }
      if (args.g[k] == wide_g[k]) convert_.widen(g[k] + first, wide_g[k], count);
    }
    for (int s = 0; s < state_count(rule); ++s) {
      args.state[s] = wide_state_[s] ? wide_state_[s] + first : states[s];
      if (!wide_state_[s]) convert_.widen(state_[s] + first, states[s], count);
    }
    loop(args);
    round(args.p, p_, 0, first, count);
    for (int s = 0; s < state_count(rule); ++s) {
      if (!wide_state_[s]) round(states[s], state_[s], uint32_t(s) + 1, first, count);
    }
    if constexpr (rule == kNone) {  // d before h: without a second gradient they are one
      convert_.narrow(args.g[1], const_cast<uint16_t*>(g[1]) + first, count);
      convert_.narrow(args.g[0], const_cast<uint16_t*>(g[0]) + first, count);
    }
  }

  void round(const float* from, uint16_t* to, uint32_t operand, int64_t first,
             int64_t count) const {
    if (kind != Low::kBFloat16 || step_.rounding_seed < 0) {
      return convert_.narrow(from, to + first, count);
    }
    static const auto by_chance = CompiledLoop<NarrowLoop<Low::kBFloat16, true>>::choose();
    by_chance({from, to + first, count, chance_, operand, first_ + uint32_t(first)});
  }

  const Step& step_;
  const Conversions<kind>& convert_;
  uint32_t first_;
  uint32_t chance_ = 0;
  uint16_t* p_ = nullptr;
  uint16_t* backup_ = nullptr;
  float* master_ = nullptr;
  uint16_t* g_[3] = {};
  uint16_t* state_[3] = {};
  float* wide_state_[3] = {};
};

template <Low kind, BaseRule rule>
void update_low_list(const Plan& plan, const Step& step) {
  const auto loop = CompiledLoop<UpdateLoop<float, rule>>::choose();
  const Conversions<kind> convert;
  for_each_chunk(plan, [&](int64_t chunk) {
    TensorScalars<float, rule> scalars;
    const auto visit = [&](int64_t tensor, int64_t begin, int64_t end, bool update,
                           bool perturbed) {
      const LowSegment<kind, rule> segment(plan, step, convert, tensor, begin);
      if (!update) return segment.restore(end - begin);
      scalars.refresh(step, plan.at(kGroup, tensor), step.steps[tensor]);
      segment.update(loop, scalars, perturbed && !step.keep_point, end - begin);
    };
    for_each_stepped_segment(plan, step, chunk, visit);
  });
}

}  // namespace wsam_fused
