// Attention with products of bf16: what attention.cpp and avx512bf16.cpp share.
//
// y = softmax(q k^T * scale + mask) v for each head. Products of bf16 are added up in f32, the
// softmax is one of f32, its weights are rounded to bf16 before they meet v: as PyTorch computes it.
// A row that sees nothing is 0. What is f32 in memory is rounded on its way, as a cast would.
#pragma once

#include <cstdint>

#if defined(DFC_SIMDE)
#define DFC_BF16
#elif defined(__x86_64__)
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define DFC_BF16
#endif
#endif

// Strides are in elements: of batches, heads and rows, whose elements lie side by side.
extern "C" struct DfcAttention {
  const void *q, *k, *v;  // [batch, heads, rows, depth], [.., heads / shared, keys, depth | width]
  const void* mask;       // [batch, heads, rows, keys], or null
  void* y;                // [batch, heads, rows, width]
  int64_t batch, heads, shared, rows, keys, depth, width;
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3], y_stride[3];
  float scale;
  uint32_t flags;
};

namespace dfc {

constexpr uint32_t FLOATS = 1;      // q, k and v are f32, else bf16
constexpr uint32_t FLOATS_OUT = 2;  // y is f32, all the same with values of bf16
constexpr uint32_t CAUSAL = 4;      // row i sees the keys up to i
constexpr uint32_t ADDED = 8;       // the mask is f32 and added, else bytes that say where to look

constexpr int64_t LARGEST_HEAD = 256;  // depth and width
constexpr int64_t STEP_ROWS = 12;  // whose scores stay in the first cache
constexpr int64_t BLOCK_ROWS = 11 * STEP_ROWS;  // of a thread at once
constexpr int64_t BLOCK_KEYS = 128;             // laid out for them at once

// What a thread needs for a block of rows. Two bf16 side by side are a u32.
struct Attending {
  alignas(64) uint32_t q[BLOCK_ROWS * LARGEST_HEAD / 2];   // [rows][depth / 2]
  alignas(64) uint32_t k[LARGEST_HEAD / 2 * BLOCK_KEYS];   // [depth / 2][keys]
  alignas(64) uint32_t v[BLOCK_KEYS / 2 * LARGEST_HEAD];   // [keys / 2][width]
  alignas(64) float scores[STEP_ROWS * BLOCK_KEYS];
  alignas(64) uint32_t weights[STEP_ROWS * BLOCK_KEYS / 2];
  alignas(64) float total[BLOCK_ROWS * LARGEST_HEAD];      // weights times v, so far
  float most[BLOCK_ROWS], sum[BLOCK_ROWS];  // of the scores, and of their exponentials, so far
};

#if defined(DFC_BF16)
// `rows` rows of a head, at most BLOCK_ROWS, from `row` on.
void attend(const DfcAttention& a, int64_t batch, int64_t head, int64_t row, int64_t rows,
            Attending& memory);
#endif

}  // namespace dfc

extern "C" {
// Whether this CPU can.
int32_t dfc_attends(void);
int32_t dfc_attention(const DfcAttention* call, int32_t threads);
}
