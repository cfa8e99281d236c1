/* Vectors of 8 floats, 8 int32 and 16 int16 in plain C; the compiler makes of them what the machine has. */
#define LANES 8

typedef struct { float v[8]; } vf;
typedef struct { int32_t v[8]; } vi;
typedef struct { int16_t v[16]; } vs;

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE float f32_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float tiny = (float)fraction * 0x1p-24f;
    return sign ? -tiny : tiny;
}

INLINE vf vf_zero(void) { return (vf){{0}}; }
INLINE vf vf_load(const void *p) { vf r; memcpy(&r, p, 32); return r; }
INLINE void vf_store(float *p, vf a) { memcpy(p, &a, 32); }
INLINE vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < 8; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
}
INLINE vf vf_scaled(vi a, float scale, vf c) {
    for (int i = 0; i < 8; i++) c.v[i] += (float)a.v[i] * scale;
    return c;
}
INLINE vf vf_of_bf16(const void *p) {
    uint16_t bits[8];
    vf r;
    memcpy(bits, p, 16);
    for (int i = 0; i < 8; i++) r.v[i] = float_of_bits((uint32_t)bits[i] << 16);
    return r;
}
INLINE vf vf_of_f16(const void *p) {
    uint16_t bits[8];
    vf r;
    memcpy(bits, p, 16);
    for (int i = 0; i < 8; i++) r.v[i] = f32_of_f16(bits[i]);
    return r;
}
INLINE void vf_sum4(const vf *a, float sums[4]) {
    for (int r = 0; r < 4; r++) {
        const float *v = a[r].v;
        sums[r] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
}
INLINE vf vf_of_int8(const void *p) {
    const int8_t *bytes = p;
    vf r;
    for (int i = 0; i < 8; i++) r.v[i] = bytes[i];
    return r;
}
INLINE vf vf_or(vf a, vf b) {
    int32_t x[8], y[8];
    memcpy(x, &a, 32), memcpy(y, &b, 32);
    for (int i = 0; i < 8; i++) x[i] |= y[i];
    memcpy(&a, x, 32);
    return a;
}
INLINE vi vi_zero(void) { return (vi){{0}}; }
INLINE vi vi_dot(vi c, vs a, vs b) {
    for (int i = 0; i < 8; i++)
        c.v[i] += (int32_t)a.v[2 * i] * b.v[2 * i] + (int32_t)a.v[2 * i + 1] * b.v[2 * i + 1];
    return c;
}
INLINE vs vs_load(const void *p) { vs r; memcpy(&r, p, 32); return r; }
INLINE vs vs_of_int8(const void *p) {
    const int8_t *bytes = p;
    vs r;
    for (int i = 0; i < 16; i++) r.v[i] = bytes[i];
    return r;
}
INLINE void vs_of_nibbles(const uint8_t *p, uint8_t scale, vs w[2]) {
    for (int i = 0; i < 16; i++) {
        w[0].v[i] = (int16_t)((p[i] & 15) * scale);
        w[1].v[i] = (int16_t)((p[i] >> 4) * scale);
    }
}
