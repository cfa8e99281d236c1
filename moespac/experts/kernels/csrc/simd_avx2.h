/* AVX2, FMA, F16C: vectors of 8 floats, 8 int32; 16 registers. */
#include <immintrin.h>

#define LANES 8
#define OWN_UNITS /* w8 and w4 are below */

typedef __m256 vf;
typedef __m256i vi;

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
INLINE vf vf_of_int8(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
INLINE vf vf_or(vf a, vf b) { return _mm256_or_ps(a, b); }
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }

/* Weights as int16: even columns, then odd ones, for that takes shifts alone; the activations lie so too. */
typedef struct { __m256i even, odd; } w8;

INLINE w8 w8_load(const void *p) {
    __m256i words = _mm256_loadu_si256(p);
    return (w8){_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8), _mm256_srai_epi16(words, 8)};
}
INLINE w8 w8_activations(const char *x) {
    return (w8){_mm256_loadu_si256((const void *)x), _mm256_loadu_si256((const void *)(x + 32))};
}
INLINE __m256i packed_words(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}
INLINE void w8_arrange(const int16_t q[UNIT8], char *x) {
    __m256i a = _mm256_loadu_si256((const void *)q), b = _mm256_loadu_si256((const void *)(q + 16));
    __m256i even = packed_words(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16),
                                _mm256_srai_epi32(_mm256_slli_epi32(b, 16), 16));
    _mm256_storeu_si256((void *)x, even);
    _mm256_storeu_si256((void *)(x + 32), packed_words(_mm256_srai_epi32(a, 16), _mm256_srai_epi32(b, 16)));
}
INLINE vi w8_dot(vi sum, w8 w, w8 x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
}

/* Weights as bytes 0 ... 15: the low nibbles of two groups and their high ones. Four products of a byte fit 16 bits,
 * and the scale comes with the addition of pairs. A unit of activations: 64 bytes, then the groups' scales by lane. */
enum { X4_UNIT = 64 + 4 * LANES };

typedef struct { __m256i low, high, scales; } w4;
typedef __m256i w4_scales;

INLINE w4_scales w4_load_scales(const uint8_t *p) { return _mm256_set1_epi64x(*(const int64_t *)p); }
INLINE w4 w4_load(const void *p, w4_scales all, int unit) {
#define BYTES(g) 0xff00ff00ff00ff00u + 0x0001000100010001u * (g)
    static const uint64_t spread[4][4] __attribute__((aligned(32))) = {{BYTES(0), BYTES(0), BYTES(1), BYTES(1)},
                                                                     {BYTES(2), BYTES(2), BYTES(3), BYTES(3)},
                                                                     {BYTES(4), BYTES(4), BYTES(5), BYTES(5)},
                                                                     {BYTES(6), BYTES(6), BYTES(7), BYTES(7)}};
    __m256i bytes = _mm256_loadu_si256(p), mask = _mm256_set1_epi8(15);
    __m256i scales = _mm256_shuffle_epi8(all, _mm256_load_si256((const __m256i *)spread[unit]));
    return (w4){_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), scales};
}
INLINE void w4_arrange(const int16_t q[UNIT4], const float scales[2], char *x) {
    for (int half = 0; half < 2; half++) { /* the first halves of both groups, then their second ones */
        __m256i first = _mm256_loadu_si256((const void *)(q + 16 * half));
        __m256i second = _mm256_loadu_si256((const void *)(q + 32 + 16 * half));
        _mm256_storeu_si256((__m256i *)x + half,
                            _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8));
    }
    _mm256_storeu_ps((float *)(x + 64), _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0])));
}
INLINE vf w4_dot(vf sum, w4 w, const char *x) {
    const __m256i *bytes = (const __m256i *)x;
    __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, _mm256_loadu_si256(bytes)),
                                     _mm256_maddubs_epi16(w.high, _mm256_loadu_si256(bytes + 1)));
    return vf_fma(_mm256_cvtepi32_ps(_mm256_madd_epi16(fours, w.scales)), vf_load(x + 64), sum);
}
