// Packing: what int8 codes have too much for sums of int16 (kernels.h, Fix).
#include <cstring>

#include "kernels.h"

namespace dfc {
namespace {

constexpr int64_t MOST_LANE = 4;

// The places of a lane's codes: two neighbours, and with 4 values the two of the next step.
constexpr int64_t PLACES[MOST_LANE] = {0, 1, 4, 5};

// Collects an output's fixes: into memory, or only to be counted.
class Collected {
 public:
  explicit Collected(Fix* to) : to_(to) {}

  void add(int64_t k, int64_t by) {
    const bool above = by > 0;
    const int64_t size = above ? by : -by;
    const int64_t block = k / LANE_BLOCK * LANE_BLOCK;
    if (used_ == 4 || block != block_ || sum_[above] + size > LANE_SUM) next();
    block_ = block;
    sum_[above] += size;
    if (to_) put(k, by);
    ++used_;
  }

  int64_t count() const { return count_ + (used_ > 0); }

 private:
  void next() {
    count_ += used_ > 0;
    used_ = sum_[0] = sum_[1] = 0;
  }

  void put(int64_t k, int64_t by) {
    Fix& fix = to_[count_];
    const uint16_t first = uint16_t(block_);
    if (used_ == 0) fix = {{first, first, first, first}, {}};
    fix.k[used_] = uint16_t(k);
    fix.by[used_] = int8_t(by);
  }

  Fix* to_;
  int64_t count_ = 0, block_ = 0, used_ = 0, sum_[2] = {};
};

// Takes what codes of one sign have too much from the largest of them.
void fix_lane(const int64_t* code, int64_t lane, int64_t sign, int64_t* by) {
  int64_t left[MOST_LANE], sum = 0;
  for (int64_t i = 0; i < lane; ++i) {
    left[i] = code[i] * sign > 0 ? code[i] * sign : 0;
    sum += left[i];
  }
  while (sum > LANE_SUM) {
    int64_t at = 0;
    for (int64_t i = 1; i < lane; ++i)
      if (left[i] > left[at]) at = i;
    const int64_t taken = least(left[at], sum - LANE_SUM);
    by[at] += sign * taken;
    left[at] -= taken;
    sum -= taken;
  }
}

// The fixes of one output, in the order of K but within a lane.
int64_t fixes_of(const int8_t* codes, int64_t k, int64_t lane, Fix* to) {
  Collected found(to);
  const int64_t steps = lane / 2 * 4;  // values that hold two lanes side by side
  for (int64_t begin = 0; begin < k; begin += steps)
    for (int64_t side = 0; side < 4; side += 2) {
      int64_t code[MOST_LANE], by[MOST_LANE] = {};
      for (int64_t i = 0; i < lane; ++i) {
        const int64_t at = begin + side + PLACES[i];
        code[i] = at < k ? codes[at] : 0;
      }
      fix_lane(code, lane, 1, by);
      fix_lane(code, lane, -1, by);
      for (int64_t i = 0; i < lane; ++i)
        if (by[i]) found.add(begin + side + PLACES[i], by[i]);
    }
  return found.count();
}

}  // namespace

Counts count_fixes(const int8_t* codes, int64_t n, int64_t k, int64_t lane) {
  Counts found = {0, 0};
  for (int64_t first = 0; first < n; first += PANEL) {
    int64_t here = 0;
    for (int64_t o = first; o < least(n, first + PANEL); ++o)
      here += fixes_of(codes + o * k, k, lane, nullptr);
    found.all += here;
    if (here > found.most) found.most = here;
  }
  return found;
}

void write_fixes(const int8_t* codes, const Layout& w, int64_t index, uint8_t* to) {
  Fixes head = {};
  Fix* fix = reinterpret_cast<Fix*>(to + sizeof head);
  int32_t count = 0;
  for (int64_t o = 0; o < PANEL; ++o) {
    head.begin[o] = count;
    const int64_t row = index * PANEL + o;
    if (row >= w.n) continue;
    const int8_t* from = codes + row * w.k;
    uint32_t sum = 0;  // beyond int32 it wraps, as the sums that it is taken from do
    for (int64_t k = 0; k < w.k; ++k) sum += uint32_t(int32_t(from[k]));
    head.offset[o] = int32_t(128 * sum);
    count += int32_t(fixes_of(from, w.k, w.lane, fix + count));
  }
  head.begin[PANEL] = count;
  std::memcpy(to, &head, sizeof head);
}

bool are_fixes(const Layout& w, const uint8_t* from) {
  Fixes head;
  std::memcpy(&head, from, sizeof head);
  const Fix* const fix = reinterpret_cast<const Fix*>(from + sizeof head);
  if (head.begin[0] != 0 || head.begin[PANEL] > w.fixes) return false;
  for (int64_t o = 0; o < PANEL; ++o) {
    if (head.begin[o] > head.begin[o + 1]) return false;
    int64_t block = 0;
    for (int32_t f = head.begin[o]; f < head.begin[o + 1]; ++f) {
      const int64_t here = fix[f].k[0] / LANE_BLOCK;
      for (int64_t i = 0; i < 4; ++i)
        if (fix[f].k[i] >= w.padded_k || fix[f].k[i] / LANE_BLOCK != here) return false;
      if (here < block) return false;
      block = here;
    }
  }
  return true;
}

}  // namespace dfc
