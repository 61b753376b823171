// perturb_ on a GPU: what cpu/perturb.cpp states. Computes in float32 (float64 for float64
// parameters) and rounds once, when it stores.
//
// Moves 3 elements per parameter (reads w and g1, writes p), 4 where a backup is written. For
// parameters of 16 bits that is 8 bytes, with a backup as with w in float32.
#pragma once

#include <type_traits>

#include "../math.h"
#include "vector.h"
#include "window.h"

namespace wsam_fused {

// Puts w back: w = fma(-s, g1, p), or the backup or the float32 weights (then `scale` is 0, and
// `source` is these).
template <int width, typename P, typename W, typename G, typename T>
WSAM_HOST_DEVICE void restore(P* p, const W* source, const G* g1, T scale,
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

// W is the type of w where it is kept: that of p, or float32 besides a p of 16 bits. These weights
// are always w, so that nothing but p is written.
template <typename P, typename W, typename G, Geometry geometry>
struct Perturb {
  using T = typename ComputeType<P>::type;
  static constexpr bool kHasMaster = !std::is_same_v<P, W>;
  static constexpr int kWidth = vector_width(sizeof(W));
  static constexpr int kBlocksPerProcessor = 5;

  struct Slot {
    Place place;
    P* p;
    const G* g1;      // null: a tensor that stays, or noise
    const W* source;  // where w is taken from: p, the backup or the float32 weights
    W* backup;        // where w is kept; null: it is not
    T from, to, eta;  // `from` is 0 where the source holds w itself
    uint32_t noise;
    bool moves, aligned;

    WSAM_HOST_DEVICE void forget() {}
  };

  Plan plan;
  const double* groups;
  const double* scalars;
  double* flags;
  bool has_backup;
  Point target;

  // What all threads need to know before they begin.
  struct Step {
    bool active;
    Point at;
  };

  WSAM_HOST_DEVICE Step begin() const {
    const Point at = Point(int(flags[kAt]));
    return {can_move(at, target, scalars), at};
  }

  WSAM_HOST_DEVICE void fill(Slot& slot, int64_t chunk, int64_t tensor, const Step& step) const {
    const double* const group = groups + plan.at(kGroup, tensor) * kGroupColumns;
    slot.place = place_of(plan, chunk, tensor);
    slot.p = start<P>(plan, kParam, tensor, slot.place);
    slot.g1 = geometry == kNoise ? nullptr : start<const G>(plan, kGrad1, tensor, slot.place);
    slot.moves = geometry == kNoise || step.at == kProbe || slot.g1;
    W* const backup = has_backup ? start<W>(plan, kBackup, tensor, slot.place) : nullptr;
    slot.backup = step.at == kWeights && !kHasMaster ? backup : nullptr;
    slot.source = backup;
    if constexpr (!kHasMaster) {
      if (step.at == kWeights || !backup) slot.source = slot.p;
    }
    slot.from = backup ? T(0) : scale_at<T>(step.at, scalars, group);
    slot.to = scale_at<T>(target, scalars, group);
    slot.eta = T(scaled_eta(geometry, scalars, group));
    if constexpr (geometry == kNoise) {
      slot.noise = noise_of_tensor(scalars[kSeed], plan.at(kKey, tensor));
    }
    slot.aligned = is_aligned<kWidth>(slot.p) && is_aligned<kWidth>(slot.g1) &&
                   is_aligned<kWidth>(slot.source) && is_aligned<kWidth>(slot.backup);
  }

  WSAM_HOST_DEVICE void work(const Window& window, const Slot* slots, int thread) const {
    const auto visit = [&](const Slot& slot, int begin, int end, int stride) {
      if (!slot.moves) return;
      for (int i = begin; i < end; i += stride) {
        for_each_piece<kWidth>(i, end, slot.aligned, [&](auto piece) {
          if (target == kWeights) {
            restore(slot.p, slot.source, slot.g1, slot.from, piece);
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
    load(slot.source, piece, w);
    if constexpr (geometry == kNoise) {
      const uint32_t first_word = uint32_t(slot.place.begin >> 5);
      WSAM_UNROLL
      for (int k = 0; k < width; ++k) {
        g[k] = noise_at<T>(slot.noise, first_word, uint32_t(piece.begin + k));
      }
    } else {
      load(slot.g1, piece, g);
    }
    if (slot.from != T(0)) {
      WSAM_UNROLL
      for (int k = 0; k < width; ++k) w[k] = recomputed(w[k], g[k], slot.from);
    }
    // First the copy: it may take the memory of g1.
    if (!kHasMaster && slot.backup) store(slot.backup, piece, w);
    WSAM_UNROLL
    for (int k = 0; k < width; ++k) w[k] = perturbed<geometry>(w[k], g[k], slot.to, slot.eta);
    store(slot.p, piece, w);
  }

  // Run by the block that is last, when no other reads the flags any more.
  WSAM_HOST_DEVICE void finish(int thread, const Step& step) const {
    if (thread == 0 && step.active) flags[kAt] = double(target);
  }
};

}  // namespace wsam_fused
