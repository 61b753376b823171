// One loop, compiled for several instruction sets, chosen when the program runs.
//
// A loop is a type with an always-inlined `static void run(const Args&)`. It is inlined into one
// function per instruction set, and the compiler vectorises it there with what that set has. The
// results do not depend on the choice: see the note on fma in math.h.
#pragma once

namespace wsam_fused {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set that the processor and WSAM_FUSED_CPU_ISA (see ops.cpp) allow.
Isa active_isa();

template <typename Loop>
struct CompiledLoop {
  using Args = typename Loop::Args;

  static void baseline(const Args& args) { Loop::run(args); }
#if defined(__x86_64__) && defined(__GNUC__)
  __attribute__((target("avx2,fma"))) static void avx2(const Args& args) { Loop::run(args); }
  __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))) static void avx512(
      const Args& args) {
    Loop::run(args);
  }
#endif

  static auto choose() {
    using Function = void (*)(const Args&);
#if defined(__x86_64__) && defined(__GNUC__)
    switch (active_isa()) {
      case Isa::kAvx512:
        return Function(avx512);
      case Isa::kAvx2:
        return Function(avx2);
      default:
        break;
    }
#endif
    return Function(baseline);
  }
};

}  // namespace wsam_fused
