// The way back to w: used by perturb_ (undo) and by update_ for tensors that are not updated.
#pragma once

#include "../math.h"
#include "loops.h"

namespace wsam_fused {

// One segment of a perturbation or of its restore.
template <typename T>
struct PerturbArgs {
  T* p;
  const T* g1;
  T* backup;
  int64_t count;
  T scale;
};

template <typename T, bool from_backup>
struct RestoreLoop {
  using Args = PerturbArgs<T>;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    T* const p = args.p;
    const T* const source = from_backup ? args.backup : args.g1;
    const int64_t count = args.count;
    const T scale = args.scale;
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
