// perturb_ on a GPU: what cpu/perturb.cpp states. Computes in float32 (float64 for float64
// parameters) and rounds once, when it stores.
#pragma once

#include "../math.h"
#include "vector.h"
#include "window.h"

namespace wsam_fused {

// Puts w back: w = fma(-s, g1, p), or the backup (then `scale` is 0 and `source` is the backup).
template <int width, typename P, typename G, typename T>
WSAM_HOST_DEVICE void restore(P* p, const P* source, const G* g1, T scale,
                              const Piece<width>& piece) {
  T from[width], g[width];
  load(source, piece, from);
  if (scale != T(0)) {
    load(g1, piece, g);
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) from[k] = recomputed(from[k], g[k], scale);
  }
  store(p, piece, from);
}

template <typename P, typename G, Geometry geometry>
struct Perturb {
  using T = typename ComputeType<P>::type;
  static constexpr int kWidth = vector_width(sizeof(P));
  static constexpr int kBlocksPerProcessor = 6;

  struct Slot {
    Place place;
    P* p;
    const G* g1;
    P* backup;  // null: w is recomputed
    T scale;
    bool aligned;

    WSAM_HOST_DEVICE void forget() {}
  };

  Plan plan;
  const double* groups;
  const double* scalars;
  double* flags;
  bool has_backup, undo;

  // What all threads need to know before they begin.
  struct Step {
    bool active;
  };

  WSAM_HOST_DEVICE Step begin() const {
    return {undo == (flags[kPerturbed] != 0) && is_finite(scalars[kMetricSq])};
  }

  WSAM_HOST_DEVICE void fill(Slot& slot, int64_t chunk, int64_t tensor, const Step&) const {
    slot.place = place_of(plan, chunk, tensor);
    slot.p = start<P>(plan, kParam, tensor, slot.place);
    slot.g1 = start<const G>(plan, kGrad1, tensor, slot.place);
    slot.backup = has_backup ? start<P>(plan, kBackup, tensor, slot.place) : nullptr;
    slot.scale =
        ascent_scale<T>(scalars[kMetricSq], groups + plan.at(kGroup, tensor) * kGroupColumns);
    slot.aligned = is_aligned<kWidth>(slot.p) && is_aligned<kWidth>(slot.g1) &&
                   is_aligned<kWidth>(slot.backup);
  }

  WSAM_HOST_DEVICE void work(const Window& window, const Slot* slots, int thread) const {
    const auto visit = [&](const Slot& slot, int begin, int end, int stride) {
      if (!slot.g1) return;
      for (int i = begin; i < end; i += stride) {
        for_each_piece<kWidth>(i, end, slot.aligned, [&](auto piece) {
          if (undo) {
            restore(slot.p, slot.backup ? slot.backup : slot.p, slot.g1,
                    slot.backup ? T(0) : slot.scale, piece);
          } else {
            move(slot, piece);
          }
        });
      }
    };
    for_each_share<kWidth>(window, slots, thread, visit);
  }

  template <int width>
  static WSAM_HOST_DEVICE void move(const Slot& slot, const Piece<width>& piece) {
    T w[width], g[width];
    load(slot.p, piece, w);
    load(slot.g1, piece, g);
    // First the copy: it may take the memory of g1.
    if (slot.backup) store(slot.backup, piece, w);
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) w[k] = perturbed<geometry>(w[k], g[k], slot.scale);
    store(slot.p, piece, w);
  }

  // Run by the block that is last, when no other reads the flags any more.
  WSAM_HOST_DEVICE void finish(int thread, const Step& step) const {
    if (thread == 0 && step.active) flags[kPerturbed] = undo ? 0.0 : 1.0;
  }
};

}  // namespace wsam_fused
