// Tells AddressSanitizer which stack is in use; it would take another one for a broken one. Without
// the sanitizer all of this is nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace wsam_fused {

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
  void* kept = nullptr;  // what the sanitizer has noted of it, while another one is in use
};

// Just before `from` is left for `to`, where it `ends` for good.
inline void leave(Stack& from, const Stack& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.kept, to.bottom, to.size);
#else
  (void)from, (void)to, (void)ends;
#endif
}

// Just after `on` is in use; says where the one before lies.
inline void arrive(const Stack& on, Stack& before) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(on.kept, &before.bottom, &before.size);
#else
  (void)on, (void)before;
#endif
}

}  // namespace wsam_fused
