/* Norm, rotation and attention of a decoder, written once and compiled for each instruction set.
 *
 * Sums run over lanes first and then over the lanes in a fixed order, so that a token's result does not depend on
 * the tokens beside it.
 */
#include "decoder.h"

#include <math.h>

#include "simd.h"

enum { KEYS = 4 }; /* at once: one load of the query serves all of them */

static void norm(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    float sums[16] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    for (; i < n; i++) sums[0] += x[i] * x[i];
    for (int j = 0; j < 16; j++) sum += sums[j];
    float inverse = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

static void rotate(float *head, const float *cos, const float *sin, int64_t width) {
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] + second * sin[i];
        head[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* scores[l] = scale * (q . keys[l]); returns the largest. */
INLINE float score(const float *q, const float *keys, int64_t length, int64_t padded, float scale, float *scores) {
    float largest = -INFINITY;
    for (int64_t at = 0; at < length; at += KEYS) {
        const float *rows[KEYS];
        vf sums[KEYS];
        float products[KEYS];
        for (int r = 0; r < KEYS; r++) {
            rows[r] = keys + (at + r < length ? at + r : length - 1) * padded;
            sums[r] = vf_zero();
        }
        for (int64_t k = 0; k < padded; k += LANES) {
            vf values = vf_load(q + k);
            for (int r = 0; r < KEYS; r++) sums[r] = vf_fma(vf_load(rows[r] + k), values, sums[r]);
        }
        vf_sum4(sums, products);
        for (int r = 0; r < KEYS && at + r < length; r++) {
            scores[at + r] = scale * products[r];
            largest = scores[at + r] > largest ? scores[at + r] : largest;
        }
    }
    return largest;
}

static void attend(const float *q, const float *keys, const float *values, int64_t length, int64_t padded, float scale,
                   float *scores, float *out) {
    float largest = score(q, keys, length, padded, scale, scores), total = 0.0f;
    for (int64_t l = 0; l < length; l++) scores[l] = exp_(scores[l] - largest);
    for (int64_t l = 0; l < length; l++) total += scores[l];
    memset(out, 0, (size_t)(4 * padded));
    for (int64_t l = 0; l < length; l++) {
        const float *row = values + l * padded;
        float share = scores[l];
        for (int64_t k = 0; k < padded; k += 16)
            for (int64_t j = 0; j < 16; j++) out[k + j] += share * row[k + j];
    }
    float inverse = 1.0f / total;
    for (int64_t k = 0; k < padded; k++) out[k] *= inverse;
}

const DecoderIsa DECODER_ISA = {norm, rotate, attend};
