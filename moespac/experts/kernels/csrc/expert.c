/* The arithmetic of experts, written once and compiled for each instruction set.
 *
 * A matrix is taken four rows at a time, so that one load of an activation serves four weights, and 256 columns
 * (a block) at a time. Weights become float vectors, or int16 vectors where they are quantised, while the same part of
 * the next four rows is fetched from memory: read in that order, memory is as fast as it gets.
 *
 * Quantised weights meet 16-bit activations, one scale a block: products and their sum over a block are exact
 * integers, then added up as floats. An int4 weight is scale * q + minimum with two row factors; scale * q fits 12
 * bits and is multiplied like an int8 weight, and the minima are an int8 matrix of their own, one column a group,
 * that meets the groups' sums of activations.
 *
 * What is added to what, and in which order, follows from the matrix alone: an output does not depend on how many
 * tokens are computed beside it.
 */
#include "kernels.h"

#include <math.h>

#include "simd.h"

enum {
    ROWS = 4,
    MOST = 4, /* rows or tokens in registers at once */
    BLOCK = 256, /* columns: their products with int4's 12-bit weights just fit the sums' 32 bits, see INT4_MAX */
    GROUP = 32,  /* columns of one int4 scale */
    SHORTS = 2 * LANES,         /* int16 in a vector */
    VECTORS = GROUP / SHORTS,   /* int16 vectors in a group */
    INT8_ACTIVATION = 32767,    /* 127 * 32767 * (256 columns / 8 lanes) < 2^31 */
    INT4_ACTIVATION = 16383     /* 15 * 255 * 16383 * (256 columns / 8 lanes) < 2^31 */
};

INLINE int64_t align_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }
INLINE int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }
INLINE int is_float(int format) { return format <= FORMAT_F16; }

/* Bytes that `columns` weights take in a row. */
INLINE int64_t bytes_of(int format, int64_t columns) {
    switch (format) {
    case FORMAT_F32: return 4 * columns;
    case FORMAT_BF16: case FORMAT_F16: return 2 * columns;
    case FORMAT_INT4: return groups_of(columns) * (GROUP / 2);
    default: return columns;
    }
}

/* ---- activations ------------------------------------------------------------------------------------------- */

/* Floats: x filled up with zeros. Integers: int16 filled up with zeros, then one float scale a block. */
INLINE int64_t plane_bytes(int is_integer, int64_t columns) {
    int64_t padded = align_up(columns, PAD);
    return align_up(is_integer ? 2 * padded + 4 * blocks_of(columns) : 4 * padded, 64);
}

static size_t prepared_bytes(const Matrix *matrix) {
    if (is_float(matrix->format)) return (size_t)plane_bytes(0, matrix->columns);
    int64_t bytes = plane_bytes(1, matrix->columns);
    return (size_t)(matrix->format == FORMAT_INT4 ? bytes + plane_bytes(1, groups_of(matrix->columns)) : bytes);
}

/* x (n <= BLOCK) -> q (n) and the scale; |x - q * scale| <= scale / 2, scale = max |x| / `most`.
 * A NaN or an infinity gives the scale NaN, which makes the output NaN. */
INLINE void quantize_block(const float *x, int64_t n, int most, int16_t *q, float *scale) {
    int32_t peak = 0; /* as bits: absolute values are ordered as their bits are */
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        peak = bits > peak ? bits : peak;
    }
    float largest;
    memcpy(&largest, &peak, 4);
    if (peak >= 0x7f800000) {
        *scale = NAN;
        memset(q, 0, (size_t)(2 * n));
        return;
    }
    *scale = largest / (float)most;
    float inverse = largest > 1e-30f ? (float)most / largest : 0.0f;
    for (int64_t i = 0; i < n; i++) {
        float whole = (x[i] * inverse + 0x1.8p23f) - 0x1.8p23f; /* the nearest */
        q[i] = (int16_t)(int32_t)whole;
    }
}

/* Where the scales are in the activations of an integer plane. */
INLINE float *scales_in(const char *plane, int64_t columns) {
    return (float *)(plane + 2 * align_up(columns, PAD));
}

static void quantize(const float *x, int64_t columns, int most, char *plane) {
    int16_t *q = (int16_t *)plane;
    for (int64_t start = 0; start < columns; start += BLOCK)
        quantize_block(x + start, least(BLOCK, columns - start), most, q + start,
                       scales_in(plane, columns) + start / BLOCK);
    memset(q + columns, 0, (size_t)(2 * (align_up(columns, PAD) - columns)));
}

/* The sums over each group of the activations in `plane`: what int4's minima are multiplied by. They are sums of
 * the rounded activations: a rounding error is then weighted by the weight and not by its distance from the
 * minimum. */
static void quantize_group_sums(const char *plane, int64_t columns, char *sums_plane) {
    const int16_t *q = (const int16_t *)plane;
    const float *scales = scales_in(plane, columns);
    int64_t groups = groups_of(columns);
    int16_t *sums_q = (int16_t *)sums_plane;
    for (int64_t start = 0; start < groups; start += BLOCK) {
        float sums[BLOCK];
        int64_t n = least(BLOCK, groups - start);
        for (int64_t g = 0; g < n; g++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < GROUP; i++) sum += q[(start + g) * GROUP + i];
            sums[g] = (float)sum * scales[(start + g) * GROUP / BLOCK];
        }
        quantize_block(sums, n, INT8_ACTIVATION, sums_q + start, scales_in(sums_plane, groups) + start / BLOCK);
    }
    memset(sums_q + groups, 0, (size_t)(2 * (align_up(groups, PAD) - groups)));
}

static void prepare(const Matrix *matrix, const float *x, char *prepared) {
    int64_t columns = matrix->columns;
    if (is_float(matrix->format)) {
        memcpy(prepared, x, (size_t)(4 * columns));
        memset(prepared + 4 * columns, 0, (size_t)(plane_bytes(0, columns) - 4 * columns));
    } else if (matrix->format == FORMAT_INT8) {
        quantize(x, columns, INT8_ACTIVATION, prepared);
    } else {
        quantize(x, columns, INT4_ACTIVATION, prepared);
        quantize_group_sums(prepared, columns, prepared + plane_bytes(1, columns));
    }
}

/* ---- four rows by a few tokens ------------------------------------------------------------------------------- */

/* Weights that lie alike and meet the same activations: a matrix, or the minima of an int4 one. */
typedef struct {
    int64_t rows, columns;
    const char *values;
    int64_t stride; /* bytes from row to row */
    const uint8_t *scales; /* int4: (rows, groups) */
    int64_t activations; /* where its activations begin in a token's */
} Plane;

/* Four rows of a plane from one column on, and where the tokens' activations for them are. */
typedef struct {
    const char *values[ROWS];
    const uint8_t *scales[ROWS];
    int64_t columns; /* a multiple of GROUP */
    const char *next; /* as many bytes of the rows after these: to be fetched meanwhile */
} Tile;

INLINE vf load_floats(const int format, const char *row, int64_t k) {
    switch (format) {
    case FORMAT_BF16: return vf_of_bf16(row + 2 * k);
    case FORMAT_F16: return vf_of_f16(row + 2 * k);
    default: return vf_load(row + 4 * k);
    }
}

INLINE void load_shorts(const int format, const char *row, const uint8_t *scales, int64_t k, vs w[VECTORS]) {
    if (format == FORMAT_INT4) {
        vs_of_nibbles((const uint8_t *)row + k / 2, scales[k / GROUP], w);
        return;
    }
    for (int v = 0; v < VECTORS; v++)
        w[v] = vs_of_int8(row + k + v * SHORTS);
}

/* Which of a tile's rows and how many tokens are in registers at once: eight sums, and what they are made of. */
typedef struct {
    int first, rows, tokens;
    int leads; /* the first to meet these weights */
} Grip;

/* Fetch what the next tile has in place of the columns k ... k + n - 1 of this grip's rows, in the order of memory. */
INLINE void prefetch(const int format, const Grip grip, const Tile *tile, int64_t k, const int n) {
    const char *from = tile->next + grip.first * bytes_of(format, tile->columns) + grip.rows * bytes_of(format, k);
    if (grip.leads && format != FORMAT_F32) /* whose four rows, 32 KiB, would push out what is needed sooner */
        for (int i = 0; i < grip.rows * bytes_of(format, n); i += 64) __builtin_prefetch(from + i);
}

/* sums[t][r] += weights[r] * x[t] over the tile's columns. `grip` is a constant. */
INLINE void add_floats(const int format, const Grip grip, const Tile *tile, const char *const *x, int64_t at, vf *sums) {
    vf acc[MOST][MOST];
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) acc[t][r] = sums[t * ROWS + grip.first + r];
    for (int64_t k = 0; k < tile->columns; k += LANES) {
        vf w[MOST];
        prefetch(format, grip, tile, k, LANES);
        for (int r = 0; r < grip.rows; r++) w[r] = load_floats(format, tile->values[grip.first + r], k);
        for (int t = 0; t < grip.tokens; t++) {
            vf value = vf_load(x[t] + 4 * (at + k));
            for (int r = 0; r < grip.rows; r++) acc[t][r] = vf_fma(w[r], value, acc[t][r]);
        }
    }
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) sums[t * ROWS + grip.first + r] = acc[t][r];
}

INLINE void add_integers(const int format, const Grip grip, const Tile *tile, const char *const *x, int64_t at,
                         int64_t scales_at, vf *sums) {
    vi acc[MOST][MOST];
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) acc[t][r] = vi_zero();
    for (int64_t k = 0; k < tile->columns; k += GROUP) {
        const char *const *values = tile->values + grip.first;
        prefetch(format, grip, tile, k, GROUP);
        const uint8_t *const *scales = tile->scales + grip.first;
        if (grip.rows > grip.tokens) { /* keep the few in registers, and load the many one by one */
            vs value[MOST][VECTORS];
            for (int t = 0; t < grip.tokens; t++)
                for (int v = 0; v < VECTORS; v++) value[t][v] = vs_load(x[t] + 2 * (at + k + v * SHORTS));
            for (int r = 0; r < grip.rows; r++) {
                vs w[VECTORS];
                load_shorts(format, values[r], scales[r], k, w);
                for (int t = 0; t < grip.tokens; t++)
                    for (int v = 0; v < VECTORS; v++) acc[t][r] = vi_dot(acc[t][r], w[v], value[t][v]);
            }
        } else {
            vs w[MOST][VECTORS];
            for (int r = 0; r < grip.rows; r++) load_shorts(format, values[r], scales[r], k, w[r]);
            for (int t = 0; t < grip.tokens; t++)
                for (int v = 0; v < VECTORS; v++) {
                    vs value = vs_load(x[t] + 2 * (at + k + v * SHORTS));
                    for (int r = 0; r < grip.rows; r++) acc[t][r] = vi_dot(acc[t][r], w[r][v], value);
                }
        }
    }
    for (int t = 0; t < grip.tokens; t++) {
        float scale;
        memcpy(&scale, x[t] + scales_at, 4);
        for (int r = 0; r < grip.rows; r++) {
            vf *sum = &sums[t * ROWS + grip.first + r];
            *sum = vf_scaled(acc[t][r], scale, *sum);
        }
    }
}

INLINE void add_grip(const int format, const Grip grip, const Tile *tile, const char *const *x, int64_t at,
                     int64_t scales_at, vf *sums) {
    if (is_float(format)) add_floats(format, grip, tile, x, at, sums);
    else add_integers(format, grip, tile, x, at, scales_at, sums);
}

/* Adds the first four, two or one of the tokens; -> how many. Four share the cost of converting the weights; float32
 * has none, and rather shares each activation between four rows. */
INLINE int add_first(const int format, const int leads, const Tile *tile, const char *const *x, int64_t at,
                     int64_t scales_at, int tokens, vf *sums) {
    if (tokens >= 4 && format != FORMAT_F32) {
        add_grip(format, (Grip){0, 2, 4, leads}, tile, x, at, scales_at, sums);
        add_grip(format, (Grip){2, 2, 4, leads}, tile, x, at, scales_at, sums);
        return 4;
    }
    if (tokens >= 2) {
        add_grip(format, (Grip){0, 4, 2, leads}, tile, x, at, scales_at, sums);
        return 2;
    }
    add_grip(format, (Grip){0, 4, 1, leads}, tile, x, at, scales_at, sums);
    return 1;
}

INLINE void add_tile(const int format, const Tile *tile, const char *const *x, int64_t at, int64_t scales_at, int tokens,
                     vf *sums) {
    int t = add_first(format, 1, tile, x, at, scales_at, tokens, sums);
    while (t < tokens) t += add_first(format, 0, tile, x + t, at, scales_at, tokens - t, sums + t * ROWS);
}

/* sums[t][r] = the products of rows `row` ... `row` + 3 with each token, still spread over lanes. Past the last row
 * the last one is taken again. */
INLINE void plane_sums(const int format, const Plane *plane, int64_t row, const char *const *prepared, int tokens,
                       vf *sums) {
    const char *x[MAX_TOKENS];
    for (int t = 0; t < tokens; t++) x[t] = prepared[t] + plane->activations;
    for (int i = 0; i < tokens * ROWS; i++) sums[i] = vf_zero();
    for (int64_t start = 0; start < plane->columns; start += BLOCK) {
        int64_t n = least(BLOCK, plane->columns - start), whole = n / GROUP * GROUP;
        int64_t scales_at = 2 * align_up(plane->columns, PAD) + 4 * (start / BLOCK);
        Tile tile = {.columns = whole,
                     .next = plane->values + (row + ROWS) * plane->stride + ROWS * bytes_of(format, start)};
        for (int r = 0; r < ROWS; r++) {
            int64_t from = least(row + r, plane->rows - 1);
            tile.values[r] = plane->values + from * plane->stride + bytes_of(format, start);
            tile.scales[r] = plane->scales ? plane->scales + (from * plane->columns + start) / GROUP : NULL;
        }
        if (whole) add_tile(format, &tile, x, start, scales_at, tokens, sums);
        if (n == whole) continue;
        char rest[ROWS][4 * GROUP]; /* reading past a row's end could leave the record */
        memset(rest, 0, sizeof rest);
        for (int r = 0; r < ROWS; r++) {
            memcpy(rest[r], tile.values[r] + bytes_of(format, whole), (size_t)bytes_of(format, n - whole));
            tile.values[r] = rest[r];
        }
        tile.columns = GROUP;
        tile.next = rest[0];
        add_tile(format, &tile, x, start + whole, scales_at, tokens, sums);
    }
}

static void plane_sums_of(int format, const Plane *plane, int64_t row, const char *const *prepared, int tokens,
                          vf *sums) {
    switch (format) {
    case FORMAT_F32: plane_sums(FORMAT_F32, plane, row, prepared, tokens, sums); break;
    case FORMAT_BF16: plane_sums(FORMAT_BF16, plane, row, prepared, tokens, sums); break;
    case FORMAT_F16: plane_sums(FORMAT_F16, plane, row, prepared, tokens, sums); break;
    case FORMAT_INT8: plane_sums(FORMAT_INT8, plane, row, prepared, tokens, sums); break;
    default: plane_sums(FORMAT_INT4, plane, row, prepared, tokens, sums); break;
    }
}

/* totals[t][r] += factor[r] * the rows' products. */
static void add_plane(int format, const Plane *plane, int64_t row, const float factors[ROWS],
                      const char *const *prepared, int tokens, float totals[][ROWS]) {
    vf sums[MAX_TOKENS * ROWS];
    plane_sums_of(format, plane, row, prepared, tokens, sums);
    for (int t = 0; t < tokens; t++) {
        float products[ROWS];
        vf_sum4(sums + t * ROWS, products);
        for (int r = 0; r < ROWS; r++) totals[t][r] += factors[r] * products[r];
    }
}

/* ---- a matrix -------------------------------------------------------------------------------------------------- */

static float bias_at(const Matrix *matrix, const char *record, int64_t row) {
    char number[4 * LANES] = {0};
    float values[LANES];
    int64_t size = bytes_of(matrix->bias_format, 1);
    memcpy(number, record + matrix->bias + row * size, (size_t)size);
    switch (matrix->bias_format) {
    case FORMAT_BF16: vf_store(values, vf_of_bf16(number)); break;
    case FORMAT_F16: vf_store(values, vf_of_f16(number)); break;
    default: vf_store(values, vf_load(number)); break;
    }
    return values[0];
}

static void multiply(const Matrix *matrix, const char *record, const char *const *prepared, int tokens,
                     float *const *out) {
    int format = matrix->format, is_int4 = format == FORMAT_INT4;
    int64_t rows = matrix->rows, columns = matrix->columns, groups = groups_of(columns);
    Plane values = {.rows = rows,
                    .columns = is_int4 ? groups * GROUP : columns,
                    .values = record + matrix->values,
                    .stride = bytes_of(format, columns),
                    .scales = is_int4 ? (const uint8_t *)record + matrix->scales : NULL};
    Plane minima = {.rows = rows,
                    .columns = groups,
                    .values = record + matrix->minima,
                    .stride = groups,
                    .activations = plane_bytes(1, columns)};
    const float *row_scales = (const float *)(record + (is_int4 ? matrix->row_scales : matrix->scales));
    for (int64_t row = 0; row < rows; row += ROWS) {
        int64_t present = least(ROWS, rows - row);
        float totals[MAX_TOKENS][ROWS], factors[ROWS] = {0}, minimum_factors[ROWS] = {0}, bias[ROWS] = {0};
        for (int64_t r = 0; r < present; r++) {
            factors[r] = is_float(format) ? 1.0f : row_scales[is_int4 ? 2 * (row + r) : row + r];
            minimum_factors[r] = is_int4 ? row_scales[2 * (row + r) + 1] : 0.0f;
            bias[r] = matrix->bias < 0 ? 0.0f : bias_at(matrix, record, row + r);
        }
        for (int t = 0; t < tokens; t++) memcpy(totals[t], bias, sizeof bias);
        add_plane(format, &values, row, factors, prepared, tokens, totals);
        if (is_int4) add_plane(FORMAT_INT8, &minima, row, minimum_factors, prepared, tokens, totals);
        for (int t = 0; t < tokens; t++) memcpy(out[t] + row, totals[t], (size_t)(4 * present));
    }
}

/* ---- gates ------------------------------------------------------------------------------------------------------ */

INLINE float activate(const int activation, float alpha, float x) {
    switch (activation) {
    case ACTIVATION_SILU: return x / (1.0f + exp_(-alpha * x));
    case ACTIVATION_GELU: return 0.5f * x * erfcf(-0.70710678f * x);
    case ACTIVATION_GELU_TANH: return x / (1.0f + exp_(-1.5957691f * (x + 0.044715f * x * x * x)));
    case ACTIVATION_RELU: return x < 0.0f ? 0.0f : x;
    default: return x < 0.0f ? 0.0f : x * x;
    }
}

INLINE void gate_with(const int activation, const Gate *gate, const float *up, float *out, int64_t width) {
    float alpha = gate->alpha, limit = gate->limit, offset = gate->offset;
    if (!gate->has_gate) {
        for (int64_t i = 0; i < width; i++) out[i] = activate(activation, alpha, up[i]);
        return;
    }
    int64_t step = gate->interleaved ? 2 : 1, second = gate->interleaved ? 1 : width;
    for (int64_t i = 0; i < width; i++) {
        float g = up[i * step], u = up[i * step + second];
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        out[i] = activate(activation, alpha, g) * (u + offset);
    }
}

static void apply_gate(const Gate *gate, const float *up, float *out, int64_t width) {
    switch (gate->activation) {
    case ACTIVATION_SILU: gate_with(ACTIVATION_SILU, gate, up, out, width); break;
    case ACTIVATION_GELU: gate_with(ACTIVATION_GELU, gate, up, out, width); break;
    case ACTIVATION_GELU_TANH: gate_with(ACTIVATION_GELU_TANH, gate, up, out, width); break;
    case ACTIVATION_RELU: gate_with(ACTIVATION_RELU, gate, up, out, width); break;
    default: gate_with(ACTIVATION_RELU2, gate, up, out, width); break;
    }
}

static int64_t read_all(const char *bytes, int64_t n) {
    int64_t sums[8] = {0};
    for (int64_t i = 0; i + 64 <= n; i += 64) {
        int64_t line[8];
        __builtin_prefetch(bytes + i + 1024, 0, 3);
        memcpy(line, bytes + i, 64);
        for (int j = 0; j < 8; j++) sums[j] ^= line[j];
    }
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

const Isa ISA = {ISA_NAME, prepared_bytes, prepare, multiply, apply_gate, read_all};
