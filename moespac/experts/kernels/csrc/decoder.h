/* The plain decoder (decoder.c): its records, what a pass over all layers (pass.c) asks of it, and what it asks of each
 * instruction set (attention.c). */
#ifndef MOESPAC_DECODER_H
#define MOESPAC_DECODER_H

#include <stdint.h>

#include "kernels.h"
#include "pool.h"

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

typedef struct {
    Matrix matrix; /* offsets from `base` */
    const char *base;
} Weights;

/* Addresses of float32 vectors; NULL where there is none. */
typedef struct {
    Weights qkv, out;
    Weights up, down; /* a dense block; up.matrix.rows is 0 where there is none */
    Gate gate;
    Weights router; /* of a block of experts, which are the caller's; router.matrix.rows is 0 where that is too */
    int64_t top_k, renormalise; /* the shares of a token's experts are made to add up to 1 */
    const float *before, *between, *q_norm, *k_norm;
    int64_t whole_norms; /* q and k are normed over all heads, not head by head */
} Layer;

typedef struct {
    int64_t hidden, heads, groups, width, padded;
    float epsilon, scale;
} Shape;

typedef struct Decoder Decoder;

const Shape *decoder_shape(const Decoder *decoder);

int64_t weights_bytes(const Weights *weights); /* without a bias */

/* From now on threads come from `pool` (of as many), or NULL: from the decoder's own. -> the one in use. */
Pool *decoder_borrow(Decoder *decoder, Pool *pool);

int decoder_layer(Decoder *decoder, const Layer *layer, float *x, const float *block, int tokens, float *store,
                          int64_t room, int64_t start, const float *cos, const float *sin, float *normed,
                          int64_t *index, float *shares);
/* logits (tokens, experts): what the router of `layer` says to x (tokens, hidden), the residual stream of a layer before
 * it. -1 when memory is short. */
int decoder_ask(Decoder *decoder, const Layer *layer, const float *x, int tokens, float *logits);
void moespac_join(const float *x, const float *weights, int64_t tokens, int64_t top_k, int64_t hidden, float *y);
int decoder_head(Decoder *decoder, const Weights *head, const float *weight, float *x, const float *block,
                         int tokens, float *logits);

extern const DecoderIsa decoder_portable;
#if defined(__x86_64__)
extern const DecoderIsa decoder_avx2, decoder_avx512;
#elif defined(__aarch64__)
extern const DecoderIsa decoder_neon;
#endif

#endif
