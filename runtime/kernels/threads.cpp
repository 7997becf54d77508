// Work split over the threads of the OpenMP library that is in the process already.
#include "threads.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace dfc {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> openmp{nullptr};

// Tasks side by side that nobody has begun yet: the first in the upper half, their end in the lower.
struct alignas(64) Share {  // on a line of its own, which its thread writes to all the time
  std::atomic<uint64_t> left;

  static uint64_t pair(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // Takes the first `count`, or the last half, but at least `count`. False where nothing is left.
  bool take(int64_t count, bool first, int64_t* from, int64_t* to) {
    uint64_t seen = left.load(std::memory_order_relaxed), rest;
    do {
      const int64_t begin = int64_t(seen >> 32), end = int64_t(seen & 0xffffffff);
      if (begin >= end) return false;
      const int64_t half = (end - begin) / 2;
      const int64_t taken = least(first || half < count ? count : half, end - begin);
      *from = first ? begin : end - taken;
      *to = *from + taken;
      rest = first ? pair(*to, end) : pair(begin, *from);
    } while (!left.compare_exchange_weak(seen, rest, std::memory_order_relaxed));
    return true;
  }
};

struct Work {
  Task task;
  const void* what;
  int64_t chunk;
  Share* shares;
  int32_t count;  // of shares
  std::atomic<int32_t> threads;  // that have begun
};

// What each thread does: a share of its own from the front, then half of what another has left.
// Why:  tasks side by side are read without a stop, and the last to finish is not waited for.
void take(void* data) {
  Work& work = *static_cast<Work*>(data);
  const int32_t own = work.threads.fetch_add(1, std::memory_order_relaxed);
  int64_t begin, end;
  for (int32_t i = 0; i < work.count;) {
    Share& share = work.shares[(own + i) % work.count];
    if (!share.take(work.chunk, i == 0, &begin, &end)) {
      ++i;
    } else if (i == 0) {
      for (; begin < end; ++begin) work.task(work.what, begin);
    } else {  // others may take from it in turn
      work.shares[own].left.store(Share::pair(begin, end), std::memory_order_relaxed);
      i = 0;
    }
  }
}

thread_local Scratch of_shares;

}  // namespace

Scratch::~Scratch() { std::free(data_); }

uint8_t* Scratch::at_least(int64_t bytes) {
  if (bytes <= bytes_) return data_;
  std::free(data_);
  bytes_ = 0;
  void* found = nullptr;
  if (posix_memalign(&found, 64, size_t(bytes))) found = nullptr;
  data_ = static_cast<uint8_t*>(found);
  if (data_) bytes_ = bytes;
  return data_;
}

void spread(int32_t threads, int64_t count, int64_t chunk, Task task, const void* what) {
  threads = int32_t(least(threads, (count + chunk - 1) / chunk));
  const GompParallel run = openmp.load(std::memory_order_acquire);
  uint8_t* memory = nullptr;
  if (run && threads > 1) memory = of_shares.at_least(threads * int64_t(sizeof(Share)));
  if (!memory) {
    for (int64_t i = 0; i < count; ++i) task(what, i);
    return;
  }
  Share* const shares = reinterpret_cast<Share*>(memory);
  for (int64_t i = 0; i < threads; ++i)
    new (shares + i) Share{{Share::pair(count * i / threads, count * (i + 1) / threads)}};
  Work work{task, what, chunk, shares, threads, {0}};
  run(take, &work, unsigned(threads), 0);
}

}  // namespace dfc

DFC_EXPORT void dfc_kernels_use_openmp(void* gomp_parallel) {
  dfc::openmp.store(reinterpret_cast<dfc::GompParallel>(gomp_parallel), std::memory_order_release);
}
