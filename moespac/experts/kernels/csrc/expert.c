/* The arithmetic of experts, written once and compiled for each instruction set.
 *
 * A matrix is taken four rows at a time, so that one load of an activation serves four weights, and 256 columns
 * (a block) at a time. The four rows lie a quarter of the matrix apart: memory is read in four long streams, each in
 * its own order, which processors fetch ahead faster than one stream.
 *
 * An int8 weight meets a 16-bit activation, one scale a block: products and their sum over a block are exact
 * integers, then added up as floats. An int4 weight is scale * q + minimum with two row factors, and meets an 8-bit
 * activation, one scale a group: the sums of scale * q over a group are exact integers, and the minima meet the
 * groups' sums of activations.
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
    BLOCK = 256,  /* columns */
    GROUP = 32,   /* columns of one int4 scale */
    BLOCK_GROUPS = BLOCK / GROUP,
    AHEAD = 1024, /* bytes of a row */
    INT8_ACTIVATION = 32767, /* 127 * 32767 * (256 columns / 8 lanes) < 2^31 */
    INT4_ACTIVATION = 127    /* 15 * 127 * 4 products < 2^15 */
};

INLINE int64_t align_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }
INLINE int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }
/* Columns that are loaded at once. */
INLINE int64_t unit_of(int format) { return format == FORMAT_INT4 ? UNIT4 : UNIT8; }
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

/* Floats: x filled up with zeros. int8: 16 bits each, filled up with zeros and arranged as the instruction set wants
 * them; one float scale a block. int4: units of 64 columns as the instruction set wants them, filled up with zeros;
 * then the sums of the groups, as floats, filled up with zeros. */
typedef struct {
    int64_t scales, sums, end; /* bytes from the start */
} Prepared;

/* Bytes of the activations of `columns`, which fill units. */
INLINE int64_t prepared_values(const int format, int64_t columns) {
    if (format == FORMAT_INT4) return columns / UNIT4 * X4_UNIT;
    return is_float(format) ? 4 * columns : 2 * columns;
}

INLINE Prepared prepared_of(const int format, int64_t columns) {
    int64_t values = prepared_values(format, align_up(columns, PAD));
    Prepared at = {values, values, values};
    if (format == FORMAT_INT8) at.end += 4 * blocks_of(columns);
    if (format == FORMAT_INT4) at.end += 4 * align_up(groups_of(columns), LANES);
    return at;
}

static size_t prepared_bytes(const Matrix *matrix) {
    return (size_t)align_up(prepared_of(matrix->format, matrix->columns).end, 64);
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

static void quantize8(const float *x, int64_t columns, char *prepared) {
    float *scales = (float *)(prepared + prepared_of(FORMAT_INT8, columns).scales);
    for (int64_t start = 0; start < columns; start += BLOCK) {
        int16_t q[BLOCK] = {0};
        int64_t n = least(BLOCK, columns - start);
        quantize_block(x + start, n, INT8_ACTIVATION, q, scales + start / BLOCK);
        for (int64_t i = 0; i < n; i += UNIT8) w8_arrange(q + i, prepared + 2 * (start + i));
    }
}

/* The sums of each group are sums of the rounded activations: a rounding error is then weighted by the weight and not
 * by its distance from the minimum. */
static void quantize4(const float *x, int64_t columns, char *prepared) {
    float *sums = (float *)(prepared + prepared_of(FORMAT_INT4, columns).sums);
    memset(sums, 0, (size_t)(4 * align_up(groups_of(columns), LANES)));
    for (int64_t start = 0; start < columns; start += UNIT4) {
        int16_t q[UNIT4] = {0};
        float scales[UNIT4 / GROUP] = {0};
        for (int64_t g = 0; g * GROUP < least(UNIT4, columns - start); g++) {
            int64_t first = start + g * GROUP;
            int32_t sum = 0;
            quantize_block(x + first, least(GROUP, columns - first), INT4_ACTIVATION, q + g * GROUP, scales + g);
            for (int64_t i = 0; i < GROUP; i++) sum += q[g * GROUP + i];
            sums[first / GROUP] = (float)sum * scales[g];
        }
        w4_arrange(q, scales, prepared + start / UNIT4 * X4_UNIT);
    }
}

static void prepare(const Matrix *matrix, const float *x, char *prepared) {
    int64_t columns = matrix->columns;
    if (matrix->format == FORMAT_INT8) {
        quantize8(x, columns, prepared);
    } else if (matrix->format == FORMAT_INT4) {
        quantize4(x, columns, prepared);
    } else {
        memcpy(prepared, x, (size_t)(4 * columns));
        memset(prepared + 4 * columns, 0, (size_t)(4 * (align_up(columns, PAD) - columns)));
    }
}

/* ---- four rows by a few tokens ------------------------------------------------------------------------------- */

/* Four rows of a matrix from one column on, and some tokens' activations for them. */
typedef struct {
    const char *values[ROWS];
    const uint8_t *scales[ROWS];      /* int4 */
    const uint8_t *last_scales[ROWS]; /* int4: of a block that is not whole, BLOCK_GROUPS of them can be read */
    int64_t columns; /* a multiple of the format's unit */
    const char *const *x;
    const float *const *x_scales; /* one a block */
} Tile;

/* Which of a tile's rows and tokens are in registers at once: eight sums at most, and what they are made of. */
typedef struct {
    int row, rows, token, tokens;
} Grip;

/* Ask for what comes next in the rows, a line of 64 bytes at a time. One token leaves the processor waiting for memory,
 * which it then fetches ahead better than it is told; between the products of several it has to be told. */
INLINE void ask_ahead(const Grip grip, const Tile *tile, int64_t at) {
    if (grip.tokens == 1 || at % 64) return;
    for (int r = 0; r < grip.rows; r++) __builtin_prefetch(tile->values[grip.row + r] + at + AHEAD, 0, 0);
}

INLINE vf load_floats(const int format, const char *row, int64_t k) {
    switch (format) {
    case FORMAT_BF16: return vf_of_bf16(row + 2 * k);
    case FORMAT_F16: return vf_of_f16(row + 2 * k);
    default: return vf_load(row + 4 * k);
    }
}

/* sums[t][r] += weights[r] * x[t] over the tile's columns. All of `grip` but its first token is constant, here and
 * below. */
INLINE void add_floats(const int format, const Grip grip, const Tile *tile, vf sums[MOST][MOST]) {
    for (int64_t k = 0; k < tile->columns; k += LANES) {
        vf w[MOST];
        if (format != FORMAT_F32) ask_ahead(grip, tile, 2 * k);
        for (int r = 0; r < grip.rows; r++) w[r] = load_floats(format, tile->values[grip.row + r], k);
        for (int t = 0; t < grip.tokens; t++) {
            vf value = vf_load(tile->x[grip.token + t] + 4 * k);
            for (int r = 0; r < grip.rows; r++) sums[t][r] = vf_fma(w[r], value, sums[t][r]);
        }
    }
}

INLINE void add_int8(const Grip grip, const Tile *tile, int64_t k, vi sums[MOST][MOST]) {
    const char *const *values = tile->values + grip.row, *const *x = tile->x + grip.token;
    ask_ahead(grip, tile, k);
    if (grip.rows > grip.tokens) { /* keep the few in registers, and load the many one by one */
        w8 value[MOST];
        for (int t = 0; t < grip.tokens; t++) value[t] = w8_activations(x[t] + 2 * k);
        for (int r = 0; r < grip.rows; r++) {
            w8 w = w8_load(values[r] + k);
            for (int t = 0; t < grip.tokens; t++) sums[t][r] = w8_dot(sums[t][r], w, value[t]);
        }
    } else {
        w8 w[MOST];
        for (int r = 0; r < grip.rows; r++) w[r] = w8_load(values[r] + k);
        for (int t = 0; t < grip.tokens; t++) {
            w8 value = w8_activations(x[t] + 2 * k);
            for (int r = 0; r < grip.rows; r++) sums[t][r] = w8_dot(sums[t][r], w[r], value);
        }
    }
}

/* sums[t][r] += the integers' products over a block, times their scale. */
INLINE void add_int8_block(const Grip grip, const Tile *tile, int64_t start, vf sums[MOST][MOST]) {
    int64_t end = least(start + BLOCK, tile->columns);
    vi block[MOST][MOST];
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) block[t][r] = vi_zero();
    for (int64_t k = start; k < end; k += UNIT8) add_int8(grip, tile, k, block);
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++)
            sums[t][r] = vf_scaled(block[t][r], tile->x_scales[grip.token + t][start / BLOCK], sums[t][r]);
}

INLINE void add_int4_block(const Grip grip, const Tile *tile, int64_t start, vf sums[MOST][MOST]) {
    const char *const *values = tile->values + grip.row, *const *x = tile->x + grip.token;
    int64_t n = least(BLOCK, tile->columns - start);
    w4_scales scales[MOST];
    for (int r = 0; r < grip.rows; r++)
        scales[r] = w4_load_scales(n == BLOCK ? tile->scales[grip.row + r] + start / GROUP
                                              : tile->last_scales[grip.row + r]);
    int64_t k = start, at = prepared_values(FORMAT_INT4, start);
    for (int unit = 0; unit < (int)(n / UNIT4); unit++, k += UNIT4, at += X4_UNIT) {
        ask_ahead(grip, tile, k / 2);
        for (int r = 0; r < grip.rows; r++) {
            w4 w = w4_load(values[r] + k / 2, scales[r], unit);
            for (int t = 0; t < grip.tokens; t++) sums[t][r] = w4_dot(sums[t][r], w, x[t] + at);
        }
    }
}

INLINE void add_grip(const int format, const Grip grip, const Tile *tile, vf *sums) {
    vf acc[MOST][MOST];
    vf *from = sums + grip.token * ROWS + grip.row;
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) acc[t][r] = from[t * ROWS + r];
    if (is_float(format)) add_floats(format, grip, tile, acc);
    for (int64_t start = 0; !is_float(format) && start < tile->columns; start += BLOCK) {
        if (format == FORMAT_INT8) add_int8_block(grip, tile, start, acc);
        else add_int4_block(grip, tile, start, acc);
    }
    for (int t = 0; t < grip.tokens; t++)
        for (int r = 0; r < grip.rows; r++) from[t * ROWS + r] = acc[t][r];
}

/* Four tokens share the cost of converting the weights, for one row where that takes many registers; float32 has none,
 * and rather shares each activation between four rows. */
INLINE void add_tile(const int format, const Tile *tile, int tokens, vf *sums) {
    const int rows = format == FORMAT_INT4 ? 1 : 2;
    int t = 0;
    if (format != FORMAT_F32)
        for (; t + 4 <= tokens; t += 4)
            for (int r = 0; r < ROWS; r += rows) add_grip(format, (Grip){r, rows, t, 4}, tile, sums);
    for (; t + 2 <= tokens; t += 2) add_grip(format, (Grip){0, 4, t, 2}, tile, sums);
    if (t < tokens) add_grip(format, (Grip){0, 4, t, 1}, tile, sums);
}

/* sums[t][r] = the products of a matrix's rows rows[r] with each token, still spread over lanes. */
INLINE void add_rows(const int format, const Matrix *matrix, const char *record, const int64_t rows[ROWS],
                     const char *const *prepared, int tokens, vf *sums) {
    int64_t groups = groups_of(matrix->columns), columns = format == FORMAT_INT4 ? groups * GROUP : matrix->columns;
    int64_t whole = columns / unit_of(format) * unit_of(format);
    /* Few tokens meet each weight once. More come back for it: it has to be in the first cache still. */
    int64_t step = tokens > MOST ? 4 * BLOCK : columns;
    uint8_t last_scales[ROWS][2 * BLOCK_GROUPS];
    const char *x[MAX_TOKENS];
    const float *x_scales[MAX_TOKENS];
    Tile tile; /* not cleared, and nothing else here that need not be: it costs as much as the sums of a short row */
    tile.x = x;
    tile.x_scales = x_scales;
    for (int r = 0; format == FORMAT_INT4 && r < ROWS; r++) {
        const uint8_t *scales = (const uint8_t *)record + matrix->scales + rows[r] * groups;
        tile.scales[r] = scales;
        if (columns % BLOCK == 0) continue;
        memset(last_scales[r], 0, sizeof last_scales[r]);
        memcpy(last_scales[r], scales + columns / BLOCK * BLOCK_GROUPS, (size_t)(columns % BLOCK / GROUP));
        tile.last_scales[r] = last_scales[r];
    }
    for (int i = 0; i < tokens * ROWS; i++) sums[i] = vf_zero();
    for (int64_t start = 0; start < columns; start += step) {
        int64_t end = least(start + step, whole);
        for (int t = 0; t < tokens; t++) {
            x[t] = prepared[t] + prepared_values(format, start);
            x_scales[t] = (const float *)(prepared[t] + prepared_of(format, matrix->columns).scales) + start / BLOCK;
        }
        for (int r = 0; r < ROWS; r++) {
            tile.values[r] = record + matrix->values + rows[r] * bytes_of(format, columns) + bytes_of(format, start);
            if (format == FORMAT_INT4 && start) tile.scales[r] += step / GROUP;
        }
        tile.columns = end - start;
        if (tile.columns) add_tile(format, &tile, tokens, sums);
    }
    if (columns == whole) return;
    char rest[ROWS][4 * UNIT4] = {{0}}; /* reading past a row's end could leave the record */
    for (int r = 0; r < ROWS; r++) {
        const char *from = record + matrix->values + rows[r] * bytes_of(format, columns) + bytes_of(format, whole);
        tile.values[r] = memcpy(rest[r], from, (size_t)bytes_of(format, columns - whole));
        if (format == FORMAT_INT4) tile.last_scales[r] += whole % BLOCK / GROUP;
    }
    tile.columns = unit_of(format);
    for (int t = 0; t < tokens; t++) {
        x[t] = prepared[t] + prepared_values(format, whole);
        x_scales[t] = (const float *)(prepared[t] + prepared_of(format, matrix->columns).scales) + whole / BLOCK;
    }
    add_tile(format, &tile, tokens, sums);
}

/* sums[t][r] = int4: the products of the rows' minima with sums of groups, still spread over lanes. */
INLINE void add_minima(const Matrix *matrix, const char *record, const int64_t rows[ROWS], const char *const *prepared,
                       const int tokens, vf *sums) {
    int64_t groups = groups_of(matrix->columns), whole = groups / LANES * LANES, g = 0;
    const char *minima[ROWS], *x[MOST];
    vf acc[MOST][ROWS];
    for (int r = 0; r < ROWS; r++) minima[r] = record + matrix->minima + rows[r] * groups;
    for (int t = 0; t < tokens; t++) x[t] = prepared[t] + prepared_of(FORMAT_INT4, matrix->columns).sums;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++) acc[t][r] = vf_zero();
    for (; g < whole; g += LANES)
        for (int r = 0; r < ROWS; r++) {
            vf minimum = vf_of_int8(minima[r] + g);
            for (int t = 0; t < tokens; t++) acc[t][r] = vf_fma(minimum, vf_load(x[t] + 4 * g), acc[t][r]);
        }
    for (int r = 0; g < groups && r < ROWS; r++) {
        char rest[LANES] = {0};
        memcpy(rest, minima[r] + g, (size_t)(groups - g));
        vf minimum = vf_of_int8(rest);
        for (int t = 0; t < tokens; t++) acc[t][r] = vf_fma(minimum, vf_load(x[t] + 4 * g), acc[t][r]);
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++) sums[t * ROWS + r] = acc[t][r];
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

INLINE void multiply_as(const int format, const Matrix *matrix, const char *record, const char *const *prepared,
                        int tokens, float *const *out) {
    const float *factors = (const float *)(record + (format == FORMAT_INT4 ? matrix->row_scales : matrix->scales));
    int64_t apart = (matrix->rows + ROWS - 1) / ROWS;
    for (int64_t row = 0; row < apart; row++) {
        int64_t rows[ROWS];
        float bias[ROWS] = {0};
        for (int r = 0; r < ROWS; r++) {
            rows[r] = least(row + r * apart, matrix->rows - 1); /* past the last row it is taken again */
            if (matrix->bias >= 0) bias[r] = bias_at(matrix, record, rows[r]);
        }
        vf sums[MAX_TOKENS * ROWS], minima[MAX_TOKENS * ROWS];
        add_rows(format, matrix, record, rows, prepared, tokens, sums);
        if (format == FORMAT_INT4) {
            int t = 0;
            for (; t + 2 <= tokens; t += 2) add_minima(matrix, record, rows, prepared + t, 2, minima + t * ROWS);
            if (t < tokens) add_minima(matrix, record, rows, prepared + t, 1, minima + t * ROWS);
        }
        for (int t = 0; t < tokens; t++) {
            float products[ROWS], least_products[ROWS];
            vf_sum4(sums + t * ROWS, products);
            if (format == FORMAT_INT4) vf_sum4(minima + t * ROWS, least_products);
            for (int r = 0; r < ROWS; r++) {
                float total = products[r];
                if (format == FORMAT_INT8) total *= factors[rows[r]];
                if (format == FORMAT_INT4)
                    total = factors[2 * rows[r]] * total + factors[2 * rows[r] + 1] * least_products[r];
                out[t][rows[r]] = bias[r] + total;
            }
        }
    }
}

static void multiply(const Matrix *matrix, const char *record, const char *const *prepared, int tokens,
                     float *const *out) {
    switch (matrix->format) {
    case FORMAT_F32: multiply_as(FORMAT_F32, matrix, record, prepared, tokens, out); break;
    case FORMAT_BF16: multiply_as(FORMAT_BF16, matrix, record, prepared, tokens, out); break;
    case FORMAT_F16: multiply_as(FORMAT_F16, matrix, record, prepared, tokens, out); break;
    case FORMAT_INT8: multiply_as(FORMAT_INT8, matrix, record, prepared, tokens, out); break;
    default: multiply_as(FORMAT_INT4, matrix, record, prepared, tokens, out); break;
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

/* In four streams, as a matrix is read. */
static int64_t read_all(const char *bytes, int64_t n) {
    int64_t apart = n / (ROWS * 64) * 64, sum = 0;
    vf sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = vf_zero();
    for (int64_t i = 0; i < apart; i += 64)
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < 64 / (4 * LANES); j++)
                sums[r][j] = vf_or(sums[r][j], vf_load(bytes + r * apart + i + 4 * LANES * j));
        }
    for (int64_t i = ROWS * apart; i < n; i++) sum ^= bytes[i];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) {
            int64_t part;
            memcpy(&part, &sums[r][i], 8);
            sum ^= part;
        }
    return sum;
}

const Isa ISA = {ISA_NAME, prepared_bytes, prepare, multiply, apply_gate, read_all};
