// Attention on AVX-512 with products of bf16.
#if defined(DFC_SIMDE)
#include "emulated.h"
#include "emulated_bf16.h"
#elif defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#elif __GNUC__ >= 10
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif
#include <immintrin.h>
#endif

#include <cstring>
#include <limits>

#include "attention.h"
#include "kernels.h"

#if defined(DFC_BF16)

#define UNROLL _Pragma("GCC unroll 16")

namespace dfc {
namespace {

constexpr int64_t LANES = 16;
using Mask = uint16_t;  // of them

inline Mask first_of(int64_t count) {
  return count >= LANES ? 0xffff : count <= 0 ? 0 : Mask((1 << count) - 1);
}

// ---- products: c[rows][columns] = a[rows][pairs] times b[pairs][columns], or that added to c

// R rows and C times 16 columns, whose sums stay in registers.
template <int R, int C>
__attribute__((noinline)) void tile(const uint32_t* a, int64_t a_row, const uint32_t* b,
                                    int64_t b_row, int64_t pairs, float* c, int64_t c_row,
                                    bool add) {
  __m512 sum[R][C];
  UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < C; ++j)
    sum[i][j] = add ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, b += b_row) {
    __m512i right[C];
    UNROLL for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + j * LANES);
    UNROLL for (int i = 0; i < R; ++i) {
      const __m512i left = _mm512_set1_epi32(int32_t(a[i * a_row + k]));
      UNROLL for (int j = 0; j < C; ++j)
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
  UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < C; ++j)
    _mm512_storeu_ps(c + i * c_row + j * LANES, sum[i][j]);
}

struct Product {
  const uint32_t *a, *b;
  int64_t a_row, b_row, pairs;
  float* c;
  int64_t c_row;
  bool add;
};

template <int R, int C>
int64_t some_rows(const Product& p, int64_t row, int64_t column) {
  tile<R, C>(p.a + row * p.a_row, p.a_row, p.b + column, p.b_row, p.pairs,
             p.c + row * p.c_row + column, p.c_row, p.add);
  return R;
}

template <int C>
void all_rows(const Product& p, int64_t rows, int64_t column) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    r += left >= 6   ? some_rows<6, C>(p, r, column)
         : left >= 4 ? some_rows<4, C>(p, r, column)
         : left >= 2 ? some_rows<2, C>(p, r, column)
                     : some_rows<1, C>(p, r, column);
  }
}

// Columns come in whole registers.
void multiply(const Product& p, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 4 * LANES) {
    switch (least(4, (columns - j) / LANES)) {
      case 4: all_rows<4>(p, rows, j); break;
      case 3: all_rows<3>(p, rows, j); break;
      case 2: all_rows<2>(p, rows, j); break;
      case 1: all_rows<1>(p, rows, j); break;
    }
  }
}

// ---- laying out

// 16 elements as bf16; 0 for those that the mask leaves out.
inline __m256i half(const float* x, Mask mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x));
}

inline __m256i half(const uint16_t* x, Mask mask) { return _mm256_maskz_loadu_epi16(mask, x); }

// A row of `size`; what fills it up to a multiple of 16 is 0.
template <class T>
void lay_row(const T* x, int64_t size, uint32_t* to) {
  for (int64_t i = 0; i < size; i += LANES, to += LANES / 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half(x + i, first_of(size - i)));
}

// 16 rows of 16 become columns.
inline void turn(__m512i (&x)[16]) {
  __m512i y[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; ++j) {
    x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
    x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
  }
  UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; ++j) {
    y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
    y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
  }
  UNROLL for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

template <class T>
void lay_keys(const T* k, int64_t stride, int64_t count, int64_t depth, uint32_t* to) {
  for (int64_t i = 0; i < depth; i += 2 * LANES, to += LANES * BLOCK_KEYS) {
    const Mask low = first_of(depth - i), high = first_of(depth - i - LANES);
    for (int64_t j = 0; j < count; j += LANES) {
      __m512i rows[LANES];
      UNROLL for (int64_t r = 0; r < LANES; ++r) {
        const T* const row = k + (j + r) * stride + i;
        const bool there = j + r < count;
        const __m256i second = half(row + LANES, there ? high : Mask(0));
        rows[r] = _mm512_castsi256_si512(half(row, there ? low : Mask(0)));
        rows[r] = _mm512_inserti64x4(rows[r], second, 1);
      }
      turn(rows);
      UNROLL for (int64_t p = 0; p < LANES; ++p)
        _mm512_storeu_si512(to + p * BLOCK_KEYS + j, rows[p]);
    }
  }
}

// 16 elements as bf16, each in 32 bits.
template <class T>
inline __m512i wide(const T* x, Mask mask) {
  return _mm512_cvtepu16_epi32(half(x, mask));
}

template <class T>
void lay_values(const T* v, int64_t stride, int64_t count, int64_t width, uint32_t* to) {
  for (int64_t j = 0; j < count; j += 2, v += 2 * stride)
    for (int64_t i = 0; i < width; i += LANES, to += LANES) {
      const Mask mask = first_of(width - i);
      const __m512i one = wide(v + i, mask);
      const __m512i two = j + 1 < count ? wide(v + stride + i, mask) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
    }
}

// ---- softmax

// 2 to the power of x, which is 0 at most: 3e-6 of it too much or too little.
inline __m512 power_of_2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-151.0f), x);  // whose power is 0; a NaN stays one
  const __m512 whole = _mm512_roundscale_ps(x, 0), part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(0.00958285f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.05590643f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.24024099f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.69312419f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

// A row of scores of one block of keys.
struct Row {
  const DfcAttention& a;
  int64_t mask;     // its first element in the mask
  int64_t visible;  // how many of these keys it may see
};

// 16 scores with scale and mask, from key i on; those that are not seen are -inf.
inline __m512 seen(const Row& row, const float* scores, int64_t i) {
  Mask see = first_of(row.visible - i);
  __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(row.a.scale));
  if (row.a.mask && row.a.flags & ADDED) {
    const float* mask = static_cast<const float*>(row.a.mask) + row.mask + i;
    x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(see, mask));
  } else if (row.a.mask) {
    const uint8_t* mask = static_cast<const uint8_t*>(row.a.mask) + row.mask + i;
    const __m128i bytes = _mm_maskz_loadu_epi8(see, mask);
    see = _mm_test_epi8_mask(bytes, bytes);
  }
  return _mm512_mask_blend_ps(see, _mm512_set1_ps(NOTHING), x);
}

// The weights of a row for COUNT * 16 keys, as bf16. `most` and `sum` go on; what was added up so
// far is to be multiplied by the result.
template <int64_t COUNT>
float weigh(const Row& row, const float* scores, uint32_t* weights, float& most, float& sum) {
  __m512 x[COUNT], largest = _mm512_set1_ps(most), total = _mm512_setzero_ps();
  UNROLL for (int64_t j = 0; j < COUNT; ++j) {
    x[j] = seen(row, scores, j * LANES);
    largest = _mm512_max_ps(largest, x[j]);
  }
  const float before = most;
  most = _mm512_reduce_max_ps(largest);
  const __m512 shift = _mm512_set1_ps(most == NOTHING ? 0.0f : most), by = _mm512_set1_ps(LOG2_E);
  UNROLL for (int64_t j = 0; j < COUNT; ++j) {
    x[j] = power_of_2(_mm512_mul_ps(_mm512_sub_ps(x[j], shift), by));
    total = _mm512_add_ps(total, x[j]);
  }
  UNROLL for (int64_t j = 0; j < COUNT; ++j)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + j * LANES / 2),
                        (__m256i)_mm512_cvtneps_pbh(x[j]));
  const __m512 less = _mm512_sub_ps(_mm512_set1_ps(before), shift);
  const float keep = _mm512_cvtss_f32(power_of_2(_mm512_mul_ps(less, by)));
  sum = sum * keep + _mm512_reduce_add_ps(total);
  return keep;
}

// ---- a block of rows

// A row of y, rounded to bf16.
void store(const DfcAttention& a, int64_t at, const float* total, float sum) {
  const __m512 by = _mm512_set1_ps(sum == 0.0f ? 0.0f : 1.0f / sum);
  for (int64_t i = 0; i < a.width; i += LANES) {
    const Mask mask = first_of(a.width - i);
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(total + i), by);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(y);
    if (a.flags & FLOATS_OUT) {
      const __m512i whole = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
      _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at + i, mask, _mm512_castsi512_ps(whole));
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at + i, mask, rounded);
    }
  }
}

struct Block {
  const DfcAttention& a;
  int64_t batch, head, row, rows;
  Attending& m;
  int64_t pairs, width;  // of a head, filled up to whole registers

  int64_t at(const int64_t (&stride)[3], int64_t head, int64_t row) const {
    return batch * stride[0] + head * stride[1] + row * stride[2];
  }

  // Some rows from `first` on, whose scores stay in the first cache, for `count` keys from `key` on.
  void step(int64_t first, int64_t rows, int64_t key, int64_t count) const {
    const auto weights_of = count > 64 ? weigh<8> : count > 32 ? weigh<4> : weigh<2>;
    multiply({m.q + first * pairs, m.k, pairs, BLOCK_KEYS, pairs, m.scores, BLOCK_KEYS, false}, rows,
             up(count, LANES));
    float* const total = m.total + first * width;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = row + first + i;
      const int64_t visible = a.flags & CAUSAL ? least(count, r + 1 - key) : count;
      const Row one = {a, at(a.mask_stride, head, r) + key, visible};
      const float keep = weights_of(one, m.scores + i * BLOCK_KEYS, m.weights + i * BLOCK_KEYS / 2,
                                    m.most[first + i], m.sum[first + i]);
      for (int64_t j = 0; j < width && key && keep != 1.0f; j += LANES) {
        float* const y = total + i * width + j;
        _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_loadu_ps(y), _mm512_set1_ps(keep)));
      }
    }
    multiply({m.weights, m.v, BLOCK_KEYS / 2, width, (count + 1) / 2, total, width, key > 0}, rows,
             width);
  }

  template <class T>
  void run() const {
    const T* const q = static_cast<const T*>(a.q) + at(a.q_stride, head, row);
    const T* const k = static_cast<const T*>(a.k) + at(a.k_stride, head / a.shared, 0);
    const T* const v = static_cast<const T*>(a.v) + at(a.v_stride, head / a.shared, 0);
    for (int64_t i = 0; i < rows; ++i) {
      lay_row(q + i * a.q_stride[2], a.depth, m.q + i * pairs);
      m.most[i] = NOTHING;
      m.sum[i] = 0.0f;
    }
    const int64_t keys = a.flags & CAUSAL ? least(a.keys, row + rows) : a.keys;
    if (keys == 0) std::memset(m.total, 0, size_t(rows * width) * sizeof(float));
    for (int64_t key = 0; key < keys; key += BLOCK_KEYS) {
      const int64_t count = least(BLOCK_KEYS, keys - key);
      lay_keys(k + key * a.k_stride[2], a.k_stride[2], count, a.depth, m.k);
      lay_values(v + key * a.v_stride[2], a.v_stride[2], count, a.width, m.v);
      for (int64_t r = 0; r < rows; r += STEP_ROWS) step(r, least(STEP_ROWS, rows - r), key, count);
    }
    for (int64_t i = 0; i < rows; ++i)
      store(a, at(a.y_stride, head, row + i), m.total + i * width, m.sum[i]);
  }
};

}  // namespace

void attend(const DfcAttention& a, int64_t batch, int64_t head, int64_t row, int64_t rows,
            Attending& memory) {
  const Block block = {a,    batch,  head, row, rows, memory, up(a.depth, LANES) / 2,
                       up(a.width, LANES)};
  a.flags & FLOATS ? block.run<float>() : block.run<uint16_t>();
}

}  // namespace dfc

#endif
#if defined(__clang__) && defined(__x86_64__) && !defined(DFC_SIMDE)
#pragma clang attribute pop
#endif
