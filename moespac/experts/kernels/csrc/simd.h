/* The vectors of the instruction set that a source is compiled for, and what all of them share. */
#ifndef MOESPAC_SIMD_H
#define MOESPAC_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    UNIT8 = 32, /* int8 weights loaded at once */
    UNIT4 = 64  /* int4 weights: two groups of 32, 16 bytes each */
};

#if defined(MOESPAC_AVX512)
#include "simd_avx512.h"
#define ISA isa_avx512
#define DECODER_ISA decoder_avx512
#define ISA_NAME "avx512"
#elif defined(MOESPAC_AVX2)
#include "simd_avx2.h"
#define ISA isa_avx2
#define DECODER_ISA decoder_avx2
#define ISA_NAME "avx2"
#elif defined(MOESPAC_NEON)
#include "simd_neon.h"
#define ISA isa_neon
#define DECODER_ISA decoder_neon
#define ISA_NAME "neon"
#else
#include "simd_portable.h"
#define ISA isa_portable
#define DECODER_ISA decoder_portable
#define ISA_NAME "portable"
#endif

#ifndef OWN_UNITS
#include "simd_units.h"
#endif

/* e^x within 2 units in the last place; the compiler vectorises it. x is cut off where float32 ends. */
INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x; /* a NaN passes */
    float n = (x * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f; /* x / ln 2, to the nearest whole number */
    float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f; /* ln 2 in two parts: the first product is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = (int32_t)((uint32_t)((int32_t)n + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

#endif
