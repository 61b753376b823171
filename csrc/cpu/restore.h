// The way back to w: used by perturb_ and by update_ for tensors that are not updated.
#pragma once

#include "../math.h"
#include "loops.h"

namespace wsam_fused {

// One segment of a move between two points.
template <typename T>
struct MoveArgs {
  T* p;
  const T* g1;
  T* backup;
  int64_t count;
  T from;  // scale of the point where p is
  T to;    // scale of the point that it goes to
  T eta;
  uint32_t noise, first_word;  // see noise_at()
};

template <typename T, bool from_backup>
struct RestoreLoop {
  using Args = MoveArgs<T>;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    T* const p = args.p;
    const T* const source = from_backup ? args.backup : args.g1;
    const int64_t count = args.count;
    const T scale = args.from;
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      p[i] = from_backup ? source[i] : recomputed(p[i], source[i], scale);
    }
  }
};

template <typename T>
auto chosen_restore_loop(bool has_backup) {
  return has_backup ? CompiledLoop<RestoreLoop<T, true>>::choose()
                    : CompiledLoop<RestoreLoop<T, false>>::choose();
}

}  // namespace wsam_fused
