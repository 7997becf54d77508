// Layer norm of rows, added up where there are two: the same arithmetic, to the bit, as wide as a file is compiled.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace dfc {
namespace {

typedef float Eight __attribute__((vector_size(32)));

constexpr int64_t SUMS = 4;  // of eight, side by side

inline Eight eight(const float* x) {
  Eight v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline void put(float* y, Eight v) { std::memcpy(y, &v, sizeof v); }

// Adds f(i), of eight numbers from i on, for all of a row; `last` has those that fill no eight.
template <class F, class G>
inline float sum_of_row(int64_t n, F f, G last) {
  Eight sums[SUMS] = {};
  int64_t i = 0;
  for (; i + 8 * SUMS <= n; i += 8 * SUMS)
    _Pragma("GCC unroll 4") for (int64_t j = 0; j < SUMS; ++j) sums[j] += f(i + 8 * j);
  float rest = 0.0f;
  for (; i < n; ++i) rest += last(i);
  const Eight all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float quarter[4] = {all[0] + all[4], all[1] + all[5], all[2] + all[6], all[3] + all[7]};
  return ((quarter[0] + quarter[2]) + (quarter[1] + quarter[3])) + rest;
}

inline void norm_row(const Norm& job, int64_t row) {
  const int64_t n = job.n;
  const float *const x = job.x + row * n, *const r = job.r ? job.r + row * n : nullptr;
  float* const y = job.y + row * n;  // what is normed first
  const float all = r ? sum_of_row(n, [&](int64_t i) {
    const Eight s = eight(x + i) + eight(r + i);
    put(y + i, s);
    return s;
  }, [&](int64_t i) { return y[i] = x[i] + r[i]; }) : sum_of_row(n, [&](int64_t i) {
    put(y + i, eight(x + i));
    return eight(x + i);
  }, [&](int64_t i) { return y[i] = x[i]; });
  const float mean = all / float(n);
  const float variance = sum_of_row(n, [&](int64_t i) {
    const Eight d = eight(y + i) - mean;
    return d * d;
  }, [&](int64_t i) { return (y[i] - mean) * (y[i] - mean); }) / float(n);
  const float by = 1.0f / std::sqrt(variance + job.eps);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    put(y + i, (eight(y + i) - mean) * by * eight(job.weight + i) + eight(job.bias + i));
  for (; i < n; ++i) y[i] = (y[i] - mean) * by * job.weight[i] + job.bias[i];
}

}  // namespace
}  // namespace dfc
