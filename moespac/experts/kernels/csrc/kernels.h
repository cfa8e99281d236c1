/* What the two halves of the library share: the expert's description, and what each instruction set provides. */
#ifndef MOESPAC_KERNELS_H
#define MOESPAC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { FORMAT_F32, FORMAT_BF16, FORMAT_F16, FORMAT_INT8, FORMAT_INT4 };
enum { ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH, ACTIVATION_RELU, ACTIVATION_RELU2 };

enum {
    MAX_TOKENS = 32, /* of an expert at once: their activations of one block fill half of a 32 KiB cache */
    PAD = 64         /* activations are filled up with zeros to a multiple of this: two groups of int4 */
};

/* One matrix (rows, columns) inside a record. Offsets in bytes from the record's start, -1 where there is none. */
typedef struct {
    int64_t rows, columns;
    int64_t values;     /* floats, int8 (rows, columns), or nibbles (rows, 16 * groups) */
    int64_t scales;     /* int8: float (rows); int4: uint8 (rows, groups) */
    int64_t minima;     /* int4: int8 (rows, groups) */
    int64_t row_scales; /* int4: float (rows, 2) */
    int64_t bias;       /* (rows), in bias_format: one of the floats */
    int32_t format, bias_format;
} Matrix;

/* y = act(min(gate, limit)) * (clamp(up, -limit, limit) + offset), or y = act(up) without a gate.
 * SiLU is g * sigmoid(alpha * g). */
typedef struct {
    int32_t has_gate, interleaved, activation;
    float alpha, limit, offset;
} Gate;

typedef struct {
    Matrix up, down;
    Gate gate;
} Expert;

/* One instruction set's share of the work. All are pure but for their outputs; `scratch` is the caller's. */
typedef struct {
    const char *name;
    /* Bytes of one token's activations as `multiply` wants them. */
    size_t (*prepared_bytes)(const Matrix *matrix);
    /* x (columns) -> prepared, 64-byte aligned. */
    void (*prepare)(const Matrix *matrix, const float *x, char *prepared);
    /* out[m][n] = bias[n] + sum_k weight[n][k] * x[m][k] for `tokens` <= MAX_TOKENS prepared activations. */
    void (*multiply)(const Matrix *matrix, const char *record, const char *const *prepared, int tokens,
                     float *const *out);
    /* up (2 * width, or width without a gate) -> out (width). */
    void (*gate)(const Gate *gate, const float *up, float *out, int64_t width);
    /* Reads every byte and does next to nothing with it: the memory's speed. */
    int64_t (*read)(const char *bytes, int64_t n);
} Isa;

/* The fastest that the machine has, or the one called `name`; NULL when the machine lacks it. */
const Isa *find_isa(const char *name);

extern const Isa isa_portable;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#elif defined(__aarch64__)
extern const Isa isa_neon;
#endif

#endif
