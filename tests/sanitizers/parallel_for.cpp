// torch's parallel_for, on threads that ThreadSanitizer sees begin and end: loaded before torch, it
// is what the kernels call. torch's own threads wait for each other by means that the sanitizer
// does not know, and everything that they exchange would look like a race.
//
// Every call gets new threads, as many as there are pieces or kThreads; the grain is not asked for,
// so that even small tensors are shared by threads.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t
torch_parallel_for(int64_t begin, int64_t end, int64_t /* grain */,
                   void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t share = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    const int64_t last = first + share < end ? first + share : end;
    threads.emplace_back(body, first, last, context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
