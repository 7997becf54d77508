// The path of every CPU: plain C++, the same bits as the others.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "norm.h"

namespace dfc {
namespace {

float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (fraction << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {  // a subnormal: fraction * 2^-24
    const float value = float(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float scale_at(const Job& job, const uint8_t* panel, int64_t group, int64_t o) {
  if (job.w.half_scales) {
    uint16_t h;
    std::memcpy(&h, panel + (group * PANEL + o) * 2, 2);
    return from_half(h);
  }
  float s;
  std::memcpy(&s, panel + (group * PANEL + o) * 4, 4);
  return s;
}

void quantize(const float* x, const Layout& w, int add, int8_t* q, float* scale, int32_t* sum) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group, end = begin + w.group, real = least(end, w.k);
    uint32_t largest = 0;  // as bits: they order like numbers, and a NaN is above all
    for (int64_t i = begin; i < real; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      if (bits > largest) largest = bits;
    }
    float absmax;
    std::memcpy(&absmax, &largest, 4);
    float s = absmax / 127.0f;
    if (s == 0.0f) s = 1.0f;
    int32_t total = 0;
    for (int64_t i = begin; i < real; ++i) {
      const float r = std::nearbyintf(x[i] / s);
      // What is not a number becomes -127, as on the other paths; its scale is none either.
      const int code = r >= 127.0f ? 127 : r > -127.0f ? int(r) : -127;
      q[i] = int8_t(code ^ add);
      total += code;
    }
    for (int64_t i = real; i < end; ++i) q[i] = int8_t(add);
    scale[g] = s;
    sum[g] = total;
  }
}

void gelu(const float* x, int64_t k, float* y) {
  for (int64_t i = 0; i < k; ++i) {
    const float most = x[i] < GELU_END ? x[i] : GELU_END, near = most > -GELU_END ? most : -GELU_END;
    const float u = std::fmaf(near * near, GELU_STRETCH, -1.0f);
    float p = GELU[0];
    for (int j = 1; j < GELU_COUNT; ++j) p = std::fmaf(p, u, GELU[j]);
    const float share = x[i] > -GELU_END ? std::fmaf(near, p, 0.5f) : 0.0f;
    y[i] = x[i] * share;
  }
}

// The dot products of a group for the 16 outputs of a panel.
void dots(const Job& job, const uint8_t* panel, const int8_t* q, int64_t g, int32_t xsum,
          int32_t* acc) {
  const Layout& w = job.w;
  const uint8_t* codes = panel + w.codes_at + g * w.group_bytes;
  for (int64_t o = 0; o < PANEL; ++o) acc[o] = 0;
  q += g * w.group;
  if (w.bits == 8) {
    for (int64_t step = 0; step < w.group / 4; ++step, codes += 64)
      for (int64_t o = 0; o < PANEL; ++o)
        for (int64_t i = 0; i < 4; ++i)
          acc[o] += int32_t(int8_t(codes[4 * o + i])) * q[4 * step + i];
    return;
  }
  for (int64_t step = 0; step < w.group / 8; ++step, codes += 64)
    for (int64_t o = 0; o < PANEL; ++o)
      for (int64_t i = 0; i < 4; ++i) {
        const uint8_t two = codes[4 * o + i];
        acc[o] += int32_t(two & 15) * q[8 * step + i] + int32_t(two >> 4) * q[8 * step + 4 + i];
      }
  for (int64_t o = 0; o < PANEL; ++o) {
    const int32_t zero = w.has_zeros ? panel[w.zeros_at + g * PANEL + o] : 8;
    acc[o] -= zero * xsum;
  }
}

void one(const Job& job, int64_t panel, int64_t row) {
  const Layout& w = job.w;
  const uint8_t* p = panel_of(job, panel);
  float total[PANEL] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    int32_t acc[PANEL];
    dots(job, p, job.x.q + row * job.x.stride, g, job.x.sum[row * w.groups + g], acc);
    const float xs = job.x.scale[row * w.groups + g];
    for (int64_t o = 0; o < PANEL; ++o)
      total[o] = std::fmaf(float(acc[o]) * xs, scale_at(job, p, g, o), total[o]);
  }
  const int64_t first = panel * PANEL, count = least(PANEL, w.n - first);
  for (int64_t o = 0; o < count; ++o)
    job.y[row * w.n + first + o] = job.bias ? total[o] + job.bias[first + o] : total[o];
}

void one_row(const Job& job, int64_t panel) { one(job, panel, 0); }

void many_rows(const Job& job, int64_t panel, int64_t, int64_t row, int64_t rows, Tiling&) {
  for (int64_t r = row; r < row + rows; ++r) one(job, panel, r);
}

}  // namespace

extern const Path portable_path = {"portable", false, 0, 1, 0, 0, nullptr, nullptr, quantize,
                                   gelu, norm_row, one_row, many_rows};

}  // namespace dfc
