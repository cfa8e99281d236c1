/* AVX-512 F, BW, VL, DQ, VNNI: vectors of 16 floats, 16 int32, 32 int16; 32 registers. */
#include <immintrin.h>

#define LANES 16

typedef __m512 vf;
typedef __m512i vi, vs;

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_scaled(vi a, float scale, vf c) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(scale), c);
}
INLINE vf vf_of_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
INLINE vf vf_of_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE void vf_sum4(const vf *a, float sums[4]) {
    for (int r = 0; r < 4; r++) sums[r] = _mm512_reduce_add_ps(a[r]);
}
INLINE vf vf_of_int8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
INLINE vf vf_or(vf a, vf b) { return _mm512_or_ps(a, b); }
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_dot(vi c, vs a, vs b) { return _mm512_dpwssd_epi32(c, a, b); }
INLINE vs vs_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vs vs_of_int8(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(p)); }
INLINE void vs_of_nibbles(const uint8_t *p, uint8_t scale, vs w[1]) {
    __m128i bytes = _mm_loadu_si128((const void *)p);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
    both = _mm256_and_si256(both, _mm256_set1_epi8(15));
    w[0] = _mm512_mullo_epi16(_mm512_cvtepu8_epi16(both), _mm512_set1_epi16(scale));
}
