/* NEON of aarch64: two registers stand for one vector of 8 floats, 8 int32 or 16 int16; 32 registers. */
#include <arm_neon.h>

#define LANES 8

typedef float32x4x2_t vf;
typedef int32x4x2_t vi;
typedef int16x8x2_t vs;

INLINE vf vf_zero(void) { return (vf){{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
INLINE vf vf_load(const void *p) {
    return (vf){{vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)p + 16))}};
}
INLINE void vf_store(float *p, vf a) { vst1q_f32(p, a.val[0]), vst1q_f32(p + 4, a.val[1]); }
INLINE vf vf_fma(vf a, vf b, vf c) {
    return (vf){{vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1])}};
}
INLINE vf vf_scaled(vi a, float scale, vf c) {
    return (vf){{vfmaq_n_f32(c.val[0], vcvtq_f32_s32(a.val[0]), scale),
                 vfmaq_n_f32(c.val[1], vcvtq_f32_s32(a.val[1]), scale)}};
}
INLINE vf vf_of_bf16(const void *p) {
    uint16x8_t bits = vreinterpretq_u16_u8(vld1q_u8(p));
    return (vf){{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                 vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))}};
}
INLINE vf vf_of_f16(const void *p) {
    float16x8_t half = vreinterpretq_f16_u8(vld1q_u8(p));
    return (vf){{vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)}};
}
INLINE void vf_sum4(const vf *a, float sums[4]) {
    for (int r = 0; r < 4; r++) sums[r] = vaddvq_f32(vaddq_f32(a[r].val[0], a[r].val[1]));
}
INLINE vf vf_of_int8(const void *p) {
    int16x8_t words = vmovl_s8(vld1_s8(p));
    return (vf){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))}};
}
INLINE float32x4_t or_(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
INLINE vf vf_or(vf a, vf b) { return (vf){{or_(a.val[0], b.val[0]), or_(a.val[1], b.val[1])}}; }
INLINE vi vi_zero(void) { return (vi){{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
INLINE vi vi_dot(vi c, vs a, vs b) {
    for (int i = 0; i < 2; i++) {
        c.val[0] = vmlal_s16(c.val[0], vget_low_s16(a.val[i]), vget_low_s16(b.val[i]));
        c.val[1] = vmlal_high_s16(c.val[1], a.val[i], b.val[i]);
    }
    return c;
}
INLINE vs vs_load(const void *p) {
    return (vs){{vreinterpretq_s16_u8(vld1q_u8(p)), vreinterpretq_s16_u8(vld1q_u8((const uint8_t *)p + 16))}};
}
INLINE vs vs_of_int8(const void *p) {
    int8x16_t bytes = vld1q_s8(p);
    return (vs){{vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)}};
}
INLINE vs vs_scaled_bytes(uint8x16_t q, uint8x8_t scale) {
    return (vs){{vreinterpretq_s16_u16(vmull_u8(vget_low_u8(q), scale)),
                 vreinterpretq_s16_u16(vmull_u8(vget_high_u8(q), scale))}};
}
INLINE void vs_of_nibbles(const uint8_t *p, uint8_t scale, vs w[2]) {
    uint8x16_t bytes = vld1q_u8(p);
    w[0] = vs_scaled_bytes(vandq_u8(bytes, vdupq_n_u8(15)), vdup_n_u8(scale));
    w[1] = vs_scaled_bytes(vshrq_n_u8(bytes, 4), vdup_n_u8(scale));
}
