// perturb_: from the point where the parameters are (flags[kAt]) to the point `target`.
//
//   p <- fma(s, M(w, g1) g1, w) or w + delta z, and back to w; see Point and scale_at()
//
// operand  row      access
// p        kParam   read and written
// g1       kGrad1   read; not for the probe. A tensor whose address is 0 is left alone
// backup   kBackup  only with has_backup, else w is recomputed as fma(-s, g1, p); written where w
//                   is left, read afterwards. May be g1's own memory where the method does not need
//                   g1 any more. With has_master float32, read only: it is always w.
//
// Moves 3 elements per parameter, 4 where a backup is written. A norm that is not finite leaves the
// list alone: flags[kAt] says afterwards where it is.
#include <torch/csrc/stable/library.h>

#include "check_table.h"
#include "low_precision.h"
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

// What is the same for all segments of one move.
struct Move {
  const double* groups;
  const double* scalars;
  int64_t geometry;
  Point at, target;
  bool has_backup, has_master;

  int64_t direction() const { return target == kProbe ? int64_t(kNoise) : geometry; }
  bool keeps() const { return has_backup && !has_master && at == kWeights; }
};

template <typename T>
MoveArgs<T> scalars_of(const Plan& plan, const Move& move, int64_t tensor, int64_t begin) {
  const double* const group = move.groups + plan.at(kGroup, tensor) * kGroupColumns;
  MoveArgs<T> args{};
  args.from = scale_at<T>(move.at, move.scalars, group);
  args.to = scale_at<T>(move.target, move.scalars, group);
  args.eta = T(scaled_eta(move.geometry, move.scalars, group));
  args.noise = noise_of_tensor(move.scalars[kSeed], plan.at(kKey, tensor));
  args.first_word = uint32_t(begin >> 5);
  return args;
}

// Calls visit(tensor, begin, end) for every segment that moves; noise moves every tensor.
template <typename Visit>
void for_each_moved_segment(const Plan& plan, const Move& move, const Visit& visit) {
  const bool all = move.at == kProbe || move.target == kProbe;
  for_each_chunk(plan, [&](int64_t chunk) {
    for_each_segment(plan, chunk, [&](int64_t tensor, int64_t begin, int64_t end) {
      if (all || plan.at(kGrad1, tensor)) visit(tensor, begin, end);
    });
  });
}

template <typename T>
void move_list(const Plan& plan, const Move& move) {
  const auto chosen = [&](bool keeps) {
    return chosen_loop<T>(move.direction(), move.at, move.target, move.has_backup, keeps);
  };
  const auto loop = chosen(move.keeps());
  // Copies the segment first, which is in the cache when the loop comes to it.
  const bool may_stream =
      move.keeps() && plan.chunks * plan.chunk_size * int64_t(sizeof(T)) >= kStreamedBytes;
  const auto loop_after_copy = chosen(false);
  for_each_moved_segment(plan, move, [&](int64_t tensor, int64_t begin, int64_t end) {
    MoveArgs<T> args = scalars_of<T>(plan, move, tensor, begin);
    args.p = segment<T>(plan, kParam, tensor, begin);
    args.g1 = segment<T>(plan, kGrad1, tensor, begin);
    args.backup = move.has_backup ? segment<T>(plan, kBackup, tensor, begin) : nullptr;
    args.count = end - begin;
    const bool streams = may_stream && args.backup != args.g1;
    if (streams) stream_copy(args.backup, args.p, args.count);
    (streams ? loop_after_copy : loop)(args);
  });
}

// Of 16 bits: w comes from p, its copy, or the float32 weights.
template <Low kind>
void move_low_list(const Plan& plan, const Move& move) {
  const auto loop = chosen_move_loop<float, Source::kInPlace>(move.direction());
  const Conversions<kind> convert;
  for_each_moved_segment(plan, move, [&](int64_t tensor, int64_t begin, int64_t end) {
    MoveArgs<float> args = scalars_of<float>(plan, move, tensor, begin);
    uint16_t* const p = segment<uint16_t>(plan, kParam, tensor, begin);
    const uint16_t* const g1 = segment<uint16_t>(plan, kGrad1, tensor, begin);
    uint16_t* const backup = segment<uint16_t>(plan, kBackup, tensor, begin);
    const float* const master = segment<float>(plan, kBackup, tensor, begin);
    if (move.target == kWeights) {
      if (move.has_master) return convert.narrow(master, p, end - begin);
      std::memcpy(p, backup, size_t(end - begin) * sizeof *p);
      return;
    }
    for_each_block(end - begin, [&](int64_t first, int64_t count) {
      float w[kBlock], g[kBlock];
      const size_t bytes = size_t(count) * sizeof *p;
      if (g1) convert.widen(g1 + first, g, count);
      if (move.has_master) {
        std::memcpy(w, master + first, 2 * bytes);
      } else {
        convert.widen((move.at == kWeights ? p : backup) + first, w, count);
      }
      if (move.keeps()) std::memcpy(backup + first, p + first, bytes);  // may be g1's memory
      MoveArgs<float> block = args;
      block.p = w;
      block.g1 = g;
      block.count = count;
      block.first_word += uint32_t(first >> 5);
      loop(block);
      convert.narrow(w, p + first, count);
    });
  });
}

// The addresses that for_each_moved_segment() leads to.
void check_moved(const Plan& plan, const Move& move, int64_t groups) {
  const bool by_noise = move.at == kProbe || move.target == kProbe;
  const bool reads_gradient = move.target == kWeights ? !move.has_backup : move.target != kProbe;
  check_table(plan, groups, [&](int64_t tensor) {
    if (!by_noise && !plan.at(kGrad1, tensor)) return;
    if (reads_gradient) check_address(plan, kGrad1, "first gradient", tensor);
    if (move.has_backup) check_address(plan, kBackup, "backup", tensor);
  });
}

void perturb(Tensor table, Tensor chunks, int64_t chunk_size, ScalarType dtype,
             ScalarType grad_dtype, Tensor groups, Tensor scalars, Tensor flags, int64_t geometry,
             bool has_backup, bool has_master, int64_t target) {
  const Plan plan = checked_plan(table, chunks, chunk_size);
  const double* const group_rows = checked_groups(groups);
  const double* const scalar = checked_doubles(scalars, "scalars", kScalarSlots);
  double* const flag = checked_doubles(flags, "flags", kFlags);
  check_geometry(geometry, has_backup);
  check_point(target, has_backup);
  check_precision(dtype, has_backup, has_master, true);
  check_grad_dtype(dtype, grad_dtype);
  check_apart({&flags}, {&table, &chunks, &groups, &scalars});
  const Point at = checked_point(flag[kAt], has_backup);
  const Move move{group_rows, scalar, geometry, at, Point(target), has_backup, has_master};
  check_moved(plan, move, groups.size(0));
  if (!can_move(at, Point(target), scalar)) return;
  if (is_low(dtype)) {
    with_low(dtype, [&](auto kind) { move_low_list<kind()>(plan, move); });
  } else {
    with_dtype(dtype, [&](auto zero) { move_list<decltype(zero)>(plan, move); });
  }
  flag[kAt] = double(target);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wsam_fused, CPU, library) {
  library.impl("perturb_", TORCH_BOX(&perturb));
}

}  // namespace wsam_fused
