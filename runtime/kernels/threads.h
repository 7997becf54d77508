// Work split over the threads at hand, and memory that a thread keeps.
#pragma once

#include <cstdint>

#define DFC_EXPORT extern "C" __attribute__((visibility("default")))

namespace dfc {

using Task = void (*)(const void* what, int64_t index);

// Runs task(what, 0) ... task(what, count - 1), in any order, on up to `threads` threads, which take
// `chunk` of them at a time.
void spread(int32_t threads, int64_t count, int64_t chunk, Task task, const void* what);

// Memory that a thread keeps between calls: a call that allocates is a slow call.
class Scratch {
 public:
  ~Scratch();
  uint8_t* at_least(int64_t bytes);  // at a multiple of 64; null where there is none

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace dfc
