// What SIMDe 0.7.4 lacks of what attention in bf16 needs: only for tests (DFC_SIMDE).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dfc {

struct Sixteen {
  float of[16];
  explicit Sixteen(simde__m512 x) { simde_mm512_storeu_ps(of, x); }
};

// To the nearest, to even in between; a NaN stays one.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline simde__m256i floats_to_bf16(simde__m512 from) {
  const Sixteen x(from);
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(x.of[i]);
  return simde_mm256_loadu_si256(to);
}

static inline simde__m512i shorts_to_ints(simde__m256i from) {
  uint16_t shorts[16];
  int32_t to[16];
  simde_mm256_storeu_si256(shorts, from);
  for (int i = 0; i < 16; ++i) to[i] = shorts[i];
  return simde_mm512_loadu_si512(to);
}

template <class T>
struct Some {  // elements that a mask picks; no others are touched
  T of[16] = {};
  Some(uint16_t mask, const void* from) {
    for (int i = 0; i < 16; ++i)
      if (mask >> i & 1) of[i] = static_cast<const T*>(from)[i];
  }
};

static inline simde__m512 some_floats(uint16_t mask, const void* from) {
  return simde_mm512_loadu_ps(Some<float>(mask, from).of);
}
static inline simde__m256i some_shorts(uint16_t mask, const void* from) {
  return simde_mm256_loadu_si256(Some<uint16_t>(mask, from).of);
}
static inline simde__m128i some_bytes(uint16_t mask, const void* from) {
  return simde_mm_loadu_si128(Some<uint8_t>(mask, from).of);
}

static inline void store_floats(float* to, uint16_t mask, simde__m512 from) {
  const Sixteen x(from);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) to[i] = x.of[i];
}

static inline void store_shorts(void* to, uint16_t mask, simde__m256i from) {
  uint16_t shorts[16];
  simde_mm256_storeu_si256(shorts, from);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = shorts[i];
}

static inline uint16_t bytes_in_common(simde__m128i a, simde__m128i b) {
  uint8_t both[16];
  uint16_t found = 0;
  simde_mm_storeu_si128(both, simde_mm_and_si128(a, b));
  for (int i = 0; i < 16; ++i) found = uint16_t(found | (both[i] != 0) << i);
  return found;
}

static inline float largest_of(simde__m512 from) {
  const Sixteen x(from);
  float most = x.of[0];
  for (int i = 1; i < 16; ++i) most = x.of[i] > most ? x.of[i] : most;
  return most;
}

static inline float sum_of(simde__m512 from) {
  const Sixteen x(from);
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += x.of[i];
  return sum;
}

static inline float first_float(simde__m512 from) { return Sixteen(from).of[0]; }

}  // namespace dfc

#undef _mm512_cvtneps_pbh
#undef _mm512_cvtepu16_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm_maskz_loadu_epi8
#undef _mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#undef _mm_test_epi8_mask
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_add_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtneps_pbh dfc::floats_to_bf16
#define _mm512_cvtepu16_epi32 dfc::shorts_to_ints
#define _mm512_maskz_loadu_ps dfc::some_floats
#define _mm256_maskz_loadu_epi16 dfc::some_shorts
#define _mm_maskz_loadu_epi8 dfc::some_bytes
#define _mm512_mask_storeu_ps dfc::store_floats
#define _mm256_mask_storeu_epi16 dfc::store_shorts
#define _mm_test_epi8_mask dfc::bytes_in_common
#define _mm512_reduce_max_ps dfc::largest_of
#define _mm512_reduce_add_ps dfc::sum_of
#define _mm512_cvtss_f32 dfc::first_float
