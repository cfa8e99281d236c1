/* What the plain decoder (decoder.c) asks of each instruction set (attention.c). */
#ifndef MOESPAC_DECODER_H
#define MOESPAC_DECODER_H

#include <stdint.h>

enum { HEAD_PAD = 16 }; /* keys and values are filled up with zeros to a multiple of this: no tails in any vector */

typedef struct {
    /* x (n) -> out (n): x / rms(x) * weight. */
    void (*norm)(const float *x, const float *weight, float epsilon, int64_t n, float *out);
    /* A head (width), whose halves are turned by the angles of cos and sin (width), the sines of the first half being
     * negative. In place. */
    void (*rotate)(float *head, const float *cos, const float *sin, int64_t width);
    /* One head of one token over `length` keys and values (length, padded); q is padded too.
     * scores (length) is scratch; out (padded). */
    void (*attend)(const float *q, const float *keys, const float *values, int64_t length, int64_t padded, float scale,
                   float *scores, float *out);
} DecoderIsa;

extern const DecoderIsa decoder_portable;
#if defined(__x86_64__)
extern const DecoderIsa decoder_avx2, decoder_avx512;
#elif defined(__aarch64__)
extern const DecoderIsa decoder_neon;
#endif

#endif
