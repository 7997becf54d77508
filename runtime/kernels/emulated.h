// The intrinsics of AVX2 and AVX-512 on any CPU, by SIMDe: only for tests (DFC_SIMDE).
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>

// What SIMDe 0.7.4 lacks. Later releases have some of it: a macro of theirs is taken away first.
namespace dfc {

static inline simde__m512 halves_to_floats(simde__m256i from) {
  simde__m128i half[2];
  float to[16];
  simde_mm256_storeu_si256(half, from);
  for (int i = 0; i < 2; ++i) simde_mm256_storeu_ps(to + 8 * i, simde_mm256_cvtph_ps(half[i]));
  return simde_mm512_loadu_ps(to);
}

static inline simde__m512i bytes_to_ints(simde__m128i from) {
  uint8_t bytes[16];
  int32_t to[16];
  simde_mm_storeu_si128(bytes, from);
  for (int i = 0; i < 16; ++i) to[i] = bytes[i];
  return simde_mm512_loadu_si512(to);
}

static inline simde__m512 ints_to_floats(simde__m512i from) {
  int32_t ints[16];
  float to[16];
  simde_mm512_storeu_si512(ints, from);
  for (int i = 0; i < 16; ++i) to[i] = float(ints[i]);
  return simde_mm512_loadu_ps(to);
}

static inline simde__m512i floats_to_ints(simde__m512 from) {
  float floats[16];
  int32_t to[16];
  simde_mm512_storeu_ps(floats, from);
  for (int i = 0; i < 16; ++i) {
    const float whole = std::nearbyintf(floats[i]);
    to[i] = whole >= -0x1p31f && whole < 0x1p31f ? int32_t(whole) : INT32_MIN;
  }
  return simde_mm512_loadu_si512(to);
}

static inline simde__m512i shifted_right(simde__m512i from, int by) {
  int32_t ints[16];
  simde_mm512_storeu_si512(ints, from);
  for (int i = 0; i < 16; ++i) ints[i] >>= by;
  return simde_mm512_loadu_si512(ints);
}

// SIMDe rounds twice here.
static inline simde__m512 fused512(simde__m512 a, simde__m512 b, simde__m512 c) {
  float x[16], y[16], z[16];
  simde_mm512_storeu_ps(x, a);
  simde_mm512_storeu_ps(y, b);
  simde_mm512_storeu_ps(z, c);
  for (int i = 0; i < 16; ++i) z[i] = std::fmaf(x[i], y[i], z[i]);
  return simde_mm512_loadu_ps(z);
}

static inline simde__m256 fused256(simde__m256 a, simde__m256 b, simde__m256 c) {
  float x[8], y[8], z[8];
  simde_mm256_storeu_ps(x, a);
  simde_mm256_storeu_ps(y, b);
  simde_mm256_storeu_ps(z, c);
  for (int i = 0; i < 8; ++i) z[i] = std::fmaf(x[i], y[i], z[i]);
  return simde_mm256_loadu_ps(z);
}

}  // namespace dfc

#undef _mm512_cvtph_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_srai_epi32
#undef _mm512_fmadd_ps
#undef _mm256_fmadd_ps
#define _mm512_cvtph_ps dfc::halves_to_floats
#define _mm512_cvtepu8_epi32 dfc::bytes_to_ints
#define _mm512_cvtepi32_ps dfc::ints_to_floats
#define _mm512_cvtps_epi32 dfc::floats_to_ints
#define _mm512_srai_epi32 dfc::shifted_right
#define _mm512_fmadd_ps dfc::fused512
#define _mm256_fmadd_ps dfc::fused256
