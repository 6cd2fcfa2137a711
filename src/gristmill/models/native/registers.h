// Registers of 16 numbers.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

using bf16 = c10::BFloat16;

// ---- registers of 16 numbers --------------------------------------------------------------------

static inline __m512 wide(const bf16* p) {
  const __m512i shorts = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(shorts, 16));
}

static inline void narrow(bf16* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static inline void narrow(bf16* to, __m512 x) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
}

// Every M-th of the numbers from `from` on.
static inline __m512 column(const float* from, int64_t M) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(M)), from, 4);
}

// e^x for x <= 0: 2^n times a polynomial in what is left, to about 1e-7.
static inline __m512 exponential(__m512 x) {
  const __m512 least = _mm512_set1_ps(-100.0f), log2e = _mm512_set1_ps(1.44269504f);
  const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, least), log2e);
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.69314718f));
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// x / (1 + e^-x), through the exponential of -|x|.
static inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exponential(_mm512_min_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), x)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 share = _mm512_mask_mov_ps(one, negative, e);
  return _mm512_div_ps(_mm512_mul_ps(x, share), _mm512_add_ps(one, e));
}
