// Which elements a GPU thread visits. Only index arithmetic: compiled for the host too, where the
// tests run every thread of every block one after the other.
//
// A block takes whole chunks, chunk by chunk. It sees the tensors of a chunk through windows of at
// most kSlots tensors, whose addresses and scalars lie in shared memory. One tensor alone is walked
// by all threads together, a vector each. Several are cut into tiles of kAlignment elements, which
// never cross a tensor's border, and a few threads take a tile: a chunk of hundreds of tiny tensors
// keeps all threads busy.
#pragma once

#include "../plan.h"

namespace wsam_fused {

constexpr int kThreads = 256;
constexpr int kSlots = 32;

// Neighbouring tensors of one chunk. Positions within a chunk are 32 bits wide; only fill() of an
// operation handles whole tensors, with 64.
struct Window {
  int count;
  int low, high;  // positions in the chunk
};

// Where the elements of one tensor lie in a chunk.
struct Place {
  int64_t begin;  // element of the tensor
  int low, high;  // positions in the chunk
};

WSAM_HOST_DEVICE Place place_of(const Plan& plan, int64_t chunk, int64_t tensor) {
  const Segment segment = plan.segment(chunk, tensor);
  const int low = int(plan.at(kOffset, tensor) + segment.begin - chunk * plan.chunk_size);
  return {segment.begin, low, low + int(greater(segment.end - segment.begin, 0))};
}

// Address of the tensor's first element in the chunk; null where there is no tensor.
template <typename T>
WSAM_HOST_DEVICE T* start(const Plan& plan, TableRow row, int64_t tensor, const Place& place) {
  T* const address = plan.address<T>(row, tensor);
  return address ? address + place.begin : nullptr;
}

// The window that begins with the tensor `first`, which the chunk reaches into.
WSAM_HOST_DEVICE Window window_at(const Plan& plan, int64_t chunk, int64_t first) {
  const int64_t last = smaller(plan.last_tensor(chunk), first + kSlots - 1);
  return {int(last - first + 1), place_of(plan, chunk, first).low,
          place_of(plan, chunk, last).high};
}

// The slot whose tensor holds the position: the last one that does not begin behind it.
template <typename Slot>
WSAM_HOST_DEVICE int slot_at(const Slot* slots, int count, int position) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (slots[middle].place.low <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls visit(slot, begin, end, stride) for the thread's share of every tensor in the window: the
// vectors of `width` elements at begin, begin + stride, ... before end, counted from the tensor's
// first element in the chunk; the last one may be ragged.
template <int width, typename Slot, typename Visit>
WSAM_HOST_DEVICE void for_each_share(const Window& window, const Slot* slots, int thread,
                                     Visit&& visit) {
  static_assert(kAlignment % width == 0 && kThreads % (kAlignment / width) == 0,
                "a tile is shared by a whole number of threads, and a block holds whole tiles");
  constexpr int kLanes = int(kAlignment) / width;
  const bool alone = window.count == 1;
  const int reach = alone ? window.high - window.low : int(kAlignment);
  const int advance = alone ? reach : kThreads / kLanes * int(kAlignment);
  const int tile = alone ? 0 : thread / kLanes;
  const int lane = alone ? thread : thread % kLanes;
  const int stride = width * (alone ? kThreads : kLanes);
  for (int position = window.low + tile * int(kAlignment); position < window.high;
       position += advance) {
    const Slot& slot = slots[alone ? 0 : slot_at(slots, window.count, position)];
    const int begin = position - slot.place.low;
    const int end = begin + reach;
    const int size = slot.place.high - slot.place.low;
    visit(slot, begin + lane * width, end < size ? end : size, stride);
  }
}

}  // namespace wsam_fused
