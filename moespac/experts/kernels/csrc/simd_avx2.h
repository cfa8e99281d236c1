/* AVX2, FMA, F16C: vectors of 8 floats, 8 int32, 16 int16; 16 registers. */
#include <immintrin.h>

#define LANES 8

typedef __m256 vf;
typedef __m256i vi, vs;

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_load(const void *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_scaled(vi a, float scale, vf c) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps(scale), c);
}
INLINE vf vf_of_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
INLINE vf vf_of_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE void vf_sum4(const vf *a, float sums[4]) {
    vf pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_dot(vi c, vs a, vs b) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
INLINE vs vs_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE void vs_store(int16_t *p, vs a) { _mm256_storeu_si256((void *)p, a); }
INLINE vs vs_of_int8(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
INLINE void vs_of_nibbles(const uint8_t *p, uint8_t scale, vs w[2]) {
    /* The scale as bytes times pairs (q, 0): a byte is broadcast from memory, a short is not. */
    __m256i factor = _mm256_set1_epi8((char)scale), words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
    w[0] = _mm256_maddubs_epi16(factor, _mm256_and_si256(words, _mm256_set1_epi16(15)));
    w[1] = _mm256_maddubs_epi16(factor, _mm256_srli_epi16(words, 4));
}
