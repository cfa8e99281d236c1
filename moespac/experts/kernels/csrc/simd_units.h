/* Units of quantised weights as vectors of int16 in the columns' own order, for what has no order of its own. */
enum { SHORTS = 2 * LANES };

typedef struct { vs v[UNIT8 / SHORTS]; } w8;

INLINE w8 w8_load(const char *p) {
    w8 w;
    for (int i = 0; i < UNIT8 / SHORTS; i++) w.v[i] = vs_of_int8(p + i * SHORTS);
    return w;
}
INLINE w8 w8_activations(const char *x) {
    w8 w;
    for (int i = 0; i < UNIT8 / SHORTS; i++) w.v[i] = vs_load(x + 2 * i * SHORTS);
    return w;
}
INLINE void w8_arrange(const int16_t q[UNIT8], char *x) { memcpy(x, q, 2 * UNIT8); }
INLINE vi w8_dot(vi sum, w8 w, w8 x) {
    for (int i = 0; i < UNIT8 / SHORTS; i++) sum = vi_dot(sum, w.v[i], x.v[i]);
    return sum;
}

/* Two groups; scale * q of int4 fits 12 bits. A unit of activations: 64 of 16 bits, then both groups' scales. */
enum { X4_UNIT = 2 * UNIT4 + 64 };

typedef struct { w8 group[2]; } w4;
typedef const uint8_t *w4_scales;

INLINE w4_scales w4_load_scales(const uint8_t *p) { return p; }
INLINE w4 w4_load(const char *p, w4_scales scales, int unit) {
    w4 w;
    for (int i = 0; i < 2; i++) vs_of_nibbles((const uint8_t *)p + 16 * i, scales[2 * unit + i], w.group[i].v);
    return w;
}
INLINE void w4_arrange(const int16_t q[UNIT4], const float scales[2], char *x) {
    memcpy(x, q, 2 * UNIT4);
    memcpy(x + 2 * UNIT4, scales, 2 * sizeof *scales);
}
INLINE vf w4_dot(vf sum, w4 w, const char *x) {
    const float *scales = (const float *)(x + 2 * UNIT4);
    for (int i = 0; i < 2; i++)
        sum = vf_scaled(w8_dot(vi_zero(), w.group[i], w8_activations(x + 2 * UNIT8 * i)), scales[i], sum);
    return sum;
}
