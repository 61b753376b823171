// perturb_: from the point where the parameters are (flags[kAt]) to the point `target`.
//
//   p <- fma(s, M(w, g1) g1, w) or w + delta z, and back to w; see Point and scale_at()
//
// operand  row      access
// p        kParam   read and written
// g1       kGrad1   read; not for the probe. A tensor whose address is 0 is left alone
// backup   kBackup  only with has_backup, else w is recomputed as fma(-s, g1, p); written where w
// is
//                   left, read afterwards. May be g1's own memory where the method does not need g1
//                   any more.
//
// Moves 3 elements per parameter, 4 where a backup is written. A norm that is not finite leaves the
// list alone: flags[kAt] says afterwards where it is.
#include <torch/csrc/stable/library.h>

#include "restore.h"
#include "stream.h"

namespace wsam_fused {
namespace {

// Where w comes from.
enum class Source { kInPlace, kInPlaceKept, kRecomputed, kBackup };

template <typename T, Geometry geometry, Source source>
struct MoveLoop {
  using Args = MoveArgs<T>;
  static WSAM_HOST_DEVICE void run(const Args& args) {
    T* const p = args.p;
    const T* const g1 = args.g1;
    T* const backup = args.backup;
    const int64_t count = args.count;
    const T from = args.from, to = args.to, eta = args.eta;
    const uint32_t noise = args.noise, first_word = args.first_word;
    const auto element = [=](int64_t i) __attribute__((always_inline)) {
      const T g = geometry == kNoise ? noise_at<T>(noise, first_word, uint32_t(i)) : g1[i];
      const T w = source == Source::kBackup       ? backup[i]
                  : source == Source::kRecomputed ? recomputed(p[i], g, from)
                                                  : p[i];
      p[i] = perturbed<geometry>(w, g, to, eta);
      if constexpr (source == Source::kInPlaceKept) backup[i] = w;
    };
    // Two places at once: more of the memory's latency is hidden than by one.
    const int64_t half = count / 2;
    WSAM_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < half; ++i) {
      element(i);
      element(half + i);
    }
    if (count % 2) element(count - 1);
  }
};

template <typename T, Source source>
auto chosen_move_loop(int64_t geometry) {
  if constexpr (source != Source::kRecomputed) {
    if (geometry == kAdaptive) return CompiledLoop<MoveLoop<T, kAdaptive, source>>::choose();
    if (geometry == kFisher) return CompiledLoop<MoveLoop<T, kFisher, source>>::choose();
  }
  if constexpr (source == Source::kInPlaceKept || source == Source::kInPlace) {
    if (geometry == kNoise) return CompiledLoop<MoveLoop<T, kNoise, source>>::choose();
  }
  return CompiledLoop<MoveLoop<T, kEuclidean, source>>::choose();
}

template <typename T>
auto chosen_loop(int64_t geometry, Point at, Point target, bool has_backup, bool keeps) {
  if (target == kWeights) return chosen_restore_loop<T>(has_backup);
  if (at == kWeights) {
    return keeps ? chosen_move_loop<T, Source::kInPlaceKept>(geometry)
                 : chosen_move_loop<T, Source::kInPlace>(geometry);
  }
  return has_backup ? chosen_move_loop<T, Source::kBackup>(geometry)
                    : chosen_move_loop<T, Source::kRecomputed>(geometry);
}

template <typename T>
void move_list(const Plan& plan, const double* groups, const double* scalars, int64_t geometry,
               Point at, Point target, bool has_backup) {
  const bool by_noise = at == kProbe || target == kProbe;  // which moves every tensor
  const int64_t metric = target == kProbe ? int64_t(kNoise) : geometry;
  const bool keeps = has_backup && at == kWeights;
  const auto loop = chosen_loop<T>(metric, at, target, has_backup, keeps);
  // Copies the segment first, which is in the cache when the loop comes to it.
  const bool may_stream =
      keeps && plan.chunks * plan.chunk_size * int64_t(sizeof(T)) >= kStreamedBytes;
  const auto loop_after_copy = chosen_loop<T>(metric, at, target, has_backup, false);
  for_each_chunk(plan, [&](int64_t chunk) {
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      const T* g1 = segment<T>(plan, kGrad1, tensor, begin);
      if (!g1 && !by_noise) return;
      const double* group = groups + plan.at(kGroup, tensor) * kGroupColumns;
      T* backup = has_backup ? segment<T>(plan, kBackup, tensor, begin) : nullptr;
      T* p = segment<T>(plan, kParam, tensor, begin);
      const bool streams = may_stream && backup != g1;
      if (streams) stream_copy(backup, p, end - begin);
      (streams ? loop_after_copy : loop)(
          {p, g1, backup, end - begin, scale_at<T>(at, scalars, group),
           scale_at<T>(target, scalars, group), T(group[kEta]),
           noise_of_tensor(scalars[kSeed], plan.at(kKey, tensor)), uint32_t(begin >> 5)});
    });
  });
}

void perturb(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
             ScalarType grad_dtype, Tensor groups, Tensor scalars, Tensor flags, int64_t geometry,
             bool has_backup, int64_t target) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  const double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_geometry(geometry, has_backup);
  check_point(target, has_backup);
  const Point at = Point(int(flag[kAt]));
  if (!can_move(at, Point(target), scalar)) return;
  with_dtype(dtype, grad_dtype, [&](auto zero) {
    move_list<decltype(zero)>(plan, group_rows, scalar, geometry, at, Point(target), has_backup);
  });
  flag[kAt] = double(target);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) {
  library.impl("perturb_", TORCH_BOX(&perturb));
}

}  // namespace wsam_fused
