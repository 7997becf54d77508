// Work split over the threads of the OpenMP library that is in the process already.
#include "threads.h"

#include <atomic>
#include <chrono>
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

int64_t now() {  // in nanoseconds
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether a thread does better without the others, because they do not come.
// Why:  OpenMP waits for all its threads, even where nothing is left to do. One whose core another
//       program has comes when it is its turn, after milliseconds; one row of a layer takes a twentieth
//       of one.
class Patience {
 public:
  // How long to work alone before the others are asked.
  int64_t alone(int64_t now) const { return now < until_ ? least(until_ - now, waited_) : 0; }

  // What was shared by `threads` began, left this thread with nothing to do, and ended.
  void learn(int64_t threads, int64_t began, int64_t done, int64_t ended) {
    const int64_t worked = done - began, waited = ended - done;
    worked_ += least(worked, LONG);  // or its own core was taken
    if (waited < LONG || waited < AT_WORK * worked) return;
    if (waited > (threads - 1) * worked_) {  // more than what they spared this one
      waited_ = waited;
      until_ = ended + least(TIMES * waited, MOST);
    }
    worked_ = 0;
  }

 private:
  static constexpr int64_t LONG = 500'000;  // threads that slept have come by then
  static constexpr int64_t AT_WORK = 4;     // so long they may be busy with what they took last
  static constexpr int64_t TIMES = 32;      // asking again may cost as much as it did
  static constexpr int64_t MOST = 1'000'000'000;
  int64_t until_ = 0, waited_ = 0;
  int64_t worked_ = 0;  // since the last wait
};

thread_local Patience patience;

struct Work {
  Task task;
  const void* what;
  int64_t chunk;
  Share* shares;
  int32_t count;  // of shares
  const Patience* caller;  // of the thread that asked for it, which has the first share
  int64_t* done;  // when that one found nothing more to do
  alignas(64) std::atomic<int32_t> others;  // that have begun: written to while the rest is read
};

// What each thread does: a share of its own from the front, then half of what another has left.
// Why:  tasks side by side are read without a stop, and the last to finish is not waited for.
void take(void* data) {
  Work& work = *static_cast<Work*>(data);
  const bool called = work.caller == &patience;
  const int32_t own = called ? 0 : 1 + work.others.fetch_add(1, std::memory_order_relaxed);
  if (own >= work.count) return;
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
  if (called) *work.done = now();
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
  const int32_t parts = int32_t(least(threads, (count + chunk - 1) / chunk));
  const GompParallel run = openmp.load(std::memory_order_acquire);
  uint8_t* memory = nullptr;
  if (run && parts > 1) memory = of_shares.at_least(parts * int64_t(sizeof(Share)));
  if (!memory) {
    for (int64_t i = 0; i < count; ++i) task(what, i);
    return;
  }
  int64_t began = now(), first = 0;
  for (const int64_t end = began + patience.alone(began); first < count && began < end; began = now())
    for (const int64_t next = least(first + chunk, count); first < next; ++first) task(what, first);
  if (first == count) return;
  Share* const shares = reinterpret_cast<Share*>(memory);
  const auto at = [&](int64_t i) { return first + (count - first) * i / parts; };
  for (int64_t i = 0; i < parts; ++i) new (shares + i) Share{{Share::pair(at(i), at(i + 1))}};
  int64_t done = 0;
  Work work{task, what, chunk, shares, parts, &patience, &done, {0}};
  // All threads, also those that get nothing: libgomp ends those that a smaller team leaves out, and
  // starts new ones for the next.
  run(take, &work, unsigned(threads), 0);
  patience.learn(parts, began, done, now());
}

}  // namespace dfc

DFC_EXPORT void dfc_kernels_use_openmp(void* gomp_parallel) {
  dfc::openmp.store(reinterpret_cast<dfc::GompParallel>(gomp_parallel), std::memory_order_release);
}
