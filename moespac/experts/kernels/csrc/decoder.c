/* The layers of a plain decoder for a few tokens: norm, attention over the cache, norm, and where the block after it
 * is dense, that too. A block of experts is the caller's.
 *
 * Weights are floats in place, so nothing is held twice; the residual stream is float32. Matrices that are large
 * are shared out over threads by rows, attention over long caches by heads.
 */
#include "decoder.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

enum {
    ROWS_AT_ONCE = 64,       /* of a matrix, that a thread takes */
    SHARED_WORK = 30 * 1000 /* products below which a second thread costs more than it saves: some 3 us */
};

struct Decoder {
    Shape shape;
    const Isa *isa;
    const DecoderIsa *decoder_isa;
    Pool *own, *pool; /* the second one does the work; the first, or one that was lent */
    int threads;
    /* Of MAX_TOKENS tokens; those by thread last. */
    float *normed, *wide, *mixed, *inner, *queries, *heads_out;
    char *prepared;
    size_t wide_capacity, inner_capacity, prepared_capacity, scores_capacity;
    float *scores;
};

/* ---- matrices -------------------------------------------------------------------------------------------------- */

typedef struct {
    Decoder *decoder;
    const Weights *weights;
    const char *const *prepared;
    int tokens;
    float *const *out;
} Product;

static int64_t float_bytes(int format) { return format == FORMAT_F32 ? 4 : 2; }

static void multiply_rows(void *context, int64_t item, int worker) {
    const Product *product = context;
    Matrix part = product->weights->matrix;
    int64_t first = item * ROWS_AT_ONCE;
    float *out[MAX_TOKENS];
    (void)worker;
    part.values += first * part.columns * float_bytes(part.format);
    if (part.bias >= 0) part.bias += first * float_bytes(part.bias_format);
    part.rows = part.rows - first < ROWS_AT_ONCE ? part.rows - first : ROWS_AT_ONCE;
    for (int t = 0; t < product->tokens; t++) out[t] = product->out[t] + first;
    product->decoder->isa->multiply(&part, product->weights->base, product->prepared, product->tokens, out);
}

/* out (tokens, rows) = x (tokens, columns) times the weights. */
static int multiply(Decoder *decoder, const Weights *weights, const float *x, int tokens, float *out) {
    const Matrix *matrix = &weights->matrix;
    size_t bytes = decoder->isa->prepared_bytes(matrix);
    const char *prepared[MAX_TOKENS];
    float *outs[MAX_TOKENS];
    if (!reserve((void **)&decoder->prepared, &decoder->prepared_capacity, bytes * (size_t)tokens)) return 0;
    for (int t = 0; t < tokens; t++) {
        char *place = decoder->prepared + (size_t)t * bytes;
        decoder->isa->prepare(matrix, x + t * matrix->columns, place);
        prepared[t] = place;
        outs[t] = out + t * matrix->rows;
    }
    if (matrix->rows * matrix->columns * tokens < SHARED_WORK) {
        decoder->isa->multiply(matrix, weights->base, prepared, tokens, outs);
    } else {
        Product product = {decoder, weights, prepared, tokens, outs};
        pool_run(decoder->pool, multiply_rows, &product, (matrix->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
    }
    return 1;
}

/* ---- attention ------------------------------------------------------------------------------------------------- */

typedef struct {
    Decoder *decoder;
    const float *keys, *values; /* (groups, room, padded) */
    int64_t room, start;
    int tokens;
    size_t scores_each;
} Attention;

static void attend_head(void *context, int64_t head, int worker) {
    const Attention *call = context;
    const Decoder *decoder = call->decoder;
    const Shape *shape = &decoder->shape;
    int64_t group = head / (shape->heads / shape->groups), place = group * call->room * shape->padded;
    float *scores = decoder->scores + (size_t)worker * call->scores_each;
    float *out = decoder->heads_out + worker * shape->padded;
    for (int t = 0; t < call->tokens; t++) {
        const float *q = decoder->queries + (t * shape->heads + head) * shape->padded;
        decoder->decoder_isa->attend(q, call->keys + place, call->values + place, call->start + t + 1, shape->padded,
                                     shape->scale, scores, out);
        memcpy(decoder->mixed + (t * shape->heads + head) * shape->width, out, (size_t)(4 * shape->width));
    }
}

/* Norm and rotate the queries and keys of a token; queries to the scratch, keys and values to the cache. */
static void place_heads(Decoder *decoder, const Layer *layer, float *qkv, int t, float *keys, float *values,
                        int64_t room, int64_t position, const float *cos, const float *sin) {
    const Shape *shape = &decoder->shape;
    const DecoderIsa *isa = decoder->decoder_isa;
    int64_t width = shape->width, heads = shape->heads, groups = shape->groups;
    float *k = qkv + heads * width, *v = k + groups * width;
    if (layer->q_norm && layer->whole_norms) {
        isa->norm(qkv, layer->q_norm, shape->epsilon, heads * width, qkv);
        isa->norm(k, layer->k_norm, shape->epsilon, groups * width, k);
    }
    for (int64_t head = 0; head < heads + groups; head++) {
        float *part = qkv + head * width;
        int is_key = head >= heads;
        if (layer->q_norm && !layer->whole_norms)
            isa->norm(part, is_key ? layer->k_norm : layer->q_norm, shape->epsilon, width, part);
        isa->rotate(part, cos, sin, width);
        float *place = is_key ? keys + ((head - heads) * room + position) * shape->padded
                              : decoder->queries + (t * heads + head) * shape->padded;
        memcpy(place, part, (size_t)(4 * width));
    }
    for (int64_t group = 0; group < groups; group++)
        memcpy(values + (group * room + position) * shape->padded, v + group * width, (size_t)(4 * width));
}

static int attend(Decoder *decoder, const Layer *layer, int tokens, float *keys, float *values, int64_t room,
                  int64_t start, const float *cos, const float *sin) {
    const Shape *shape = &decoder->shape;
    int64_t rows = (shape->heads + 2 * shape->groups) * shape->width, length = start + tokens;
    size_t each = ((size_t)length + 15) / 16 * 16;
    if (!reserve((void **)&decoder->wide, &decoder->wide_capacity, (size_t)(4 * tokens * rows)) ||
        !reserve((void **)&decoder->scores, &decoder->scores_capacity, 4 * each * (size_t)decoder->threads) ||
        !multiply(decoder, &layer->qkv, decoder->normed, tokens, decoder->wide))
        return 0;
    for (int t = 0; t < tokens; t++)
        place_heads(decoder, layer, decoder->wide + t * rows, t, keys, values, room, start + t, cos + t * shape->width,
                    sin + t * shape->width);
    Attention call = {decoder, keys, values, room, start, tokens, each};
    if (tokens * length * shape->heads * shape->padded < SHARED_WORK)
        for (int64_t head = 0; head < shape->heads; head++) attend_head(&call, head, 0);
    else
        pool_run(decoder->pool, attend_head, &call, shape->heads);
    return 1;
}

static const DecoderIsa *find_decoder_isa(const Isa *isa) {
#if defined(__x86_64__)
    if (isa == &isa_avx512) return &decoder_avx512;
    if (isa == &isa_avx2) return &decoder_avx2;
#elif defined(__aarch64__)
    if (isa == &isa_neon) return &decoder_neon;
#endif
    (void)isa;
    return &decoder_portable;
}

int64_t weights_bytes(const Weights *weights) {
    const Matrix *matrix = &weights->matrix;
    return matrix->rows * matrix->columns * float_bytes(matrix->format);
}

const Shape *decoder_shape(const Decoder *decoder) { return &decoder->shape; }

Pool *decoder_borrow(Decoder *decoder, Pool *pool) { return decoder->pool = pool ? pool : decoder->own; }

/* ---- what Python calls ----------------------------------------------------------------------------------------- */

static void add(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

static void norm_all(Decoder *decoder, const float *x, const float *weight, int tokens, float *out) {
    int64_t hidden = decoder->shape.hidden;
    for (int t = 0; t < tokens; t++)
        decoder->decoder_isa->norm(x + t * hidden, weight, decoder->shape.epsilon, hidden, out + t * hidden);
}

/* A token's `top_k` largest of the softmax over `logits` (experts), in place: their numbers, the largest first, the
 * lower number first among equals, and their shares. */
static void choose_experts(const Layer *layer, float *logits, int64_t *index, float *shares) {
    int64_t experts = layer->router.matrix.rows;
    float largest = logits[0], total = 0.0f, kept = 0.0f;
    for (int64_t e = 1; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
    for (int64_t e = 0; e < experts; e++) total += logits[e] = expf(logits[e] - largest);
    for (int64_t k = 0; k < layer->top_k; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; e++) best = logits[e] > logits[best] ? e : best;
        index[k] = best;
        kept += shares[k] = logits[best] / total;
        logits[best] = -1.0f;
    }
    for (int64_t k = 0; layer->renormalise && k < layer->top_k; k++) shares[k] /= kept;
}

static int route(Decoder *decoder, const Layer *layer, const float *normed, int tokens, int64_t *index,
                 float *shares) {
    int64_t experts = layer->router.matrix.rows;
    if (!reserve((void **)&decoder->wide, &decoder->wide_capacity, (size_t)(4 * tokens * experts)) ||
        !multiply(decoder, &layer->router, normed, tokens, decoder->wide))
        return 0;
    for (int t = 0; t < tokens; t++)
        choose_experts(layer, decoder->wide + t * experts, index + t * layer->top_k, shares + t * layer->top_k);
    return 1;
}

int decoder_ask(Decoder *decoder, const Layer *layer, const float *x, int tokens, float *logits) {
    norm_all(decoder, x, layer->between, tokens, decoder->normed);
    return multiply(decoder, &layer->router, decoder->normed, tokens, logits) ? 0 : -1;
}

static int dense_block(Decoder *decoder, const Layer *layer, float *x, int tokens) {
    int64_t rows = layer->up.matrix.rows, width = layer->down.matrix.columns;
    if (!reserve((void **)&decoder->wide, &decoder->wide_capacity, (size_t)(4 * tokens * rows)) ||
        !reserve((void **)&decoder->inner, &decoder->inner_capacity, (size_t)(4 * tokens * width)) ||
        !multiply(decoder, &layer->up, decoder->normed, tokens, decoder->wide))
        return 0;
    for (int t = 0; t < tokens; t++)
        decoder->isa->gate(&layer->gate, decoder->wide + t * rows, decoder->inner + t * width, width);
    if (!multiply(decoder, &layer->down, decoder->inner, tokens, decoder->normed)) return 0;
    add(x, decoder->normed, tokens * decoder->shape.hidden);
    return 1;
}

/* One layer for `tokens` <= MAX_TOKENS: x (tokens, hidden) is the residual stream, in place; `block` (or NULL) is
 * what the block before gave, and is added first. store (2, groups, room, padded) holds the layer's keys and values
 * up to `start`; cos and sin (tokens, width). normed (tokens, hidden) is what the caller's block takes, where the
 * block is not dense; index and shares (tokens, top_k) say which experts, where the layer has a router. Returns 0, or
 * -1 when memory is short. */
int decoder_layer(Decoder *decoder, const Layer *layer, float *x, const float *block, int tokens,
                                 float *store, int64_t room, int64_t start, const float *cos, const float *sin,
                                 float *normed, int64_t *index, float *shares) {
    const Shape *shape = &decoder->shape;
    float *values = store + shape->groups * room * shape->padded;
    if (block) add(x, block, tokens * shape->hidden);
    norm_all(decoder, x, layer->before, tokens, decoder->normed);
    if (!attend(decoder, layer, tokens, store, values, room, start, cos, sin)) return -1;
    if (!multiply(decoder, &layer->out, decoder->mixed, tokens, decoder->normed)) return -1;
    add(x, decoder->normed, tokens * shape->hidden);
    int dense = layer->up.matrix.rows > 0;
    norm_all(decoder, x, layer->between, tokens, dense ? decoder->normed : normed);
    if (dense) return dense_block(decoder, layer, x, tokens) ? 0 : -1;
    return layer->router.matrix.rows && !route(decoder, layer, normed, tokens, index, shares) ? -1 : 0;
}

/* y (tokens, hidden) = sum over k of weights (tokens, top_k) * x (tokens, top_k, hidden), always in this order. */
EXPORT void moespac_join(const float *x, const float *weights, int64_t tokens, int64_t top_k, int64_t hidden,
                         float *y) {
    for (int64_t t = 0; t < tokens; t++, y += hidden) {
        memset(y, 0, (size_t)(4 * hidden));
        for (int64_t k = 0; k < top_k; k++, x += hidden, weights++)
            for (int64_t i = 0; i < hidden; i++) y[i] += *weights * x[i];
    }
}

/* logits (tokens, rows of head) of x (tokens, hidden), which `block` (or NULL) is added to. */
int decoder_head(Decoder *decoder, const Weights *head, const float *weight, float *x,
                                const float *block, int tokens, float *logits) {
    if (block) add(x, block, tokens * decoder->shape.hidden);
    norm_all(decoder, x, weight, tokens, decoder->normed);
    return multiply(decoder, head, decoder->normed, tokens, logits) ? 0 : -1;
}

EXPORT void moespac_decoder_free(Decoder *decoder) {
    if (decoder->own) pool_free(decoder->own);
    free(decoder->normed);
    free(decoder->wide);
    free(decoder->mixed);
    free(decoder->inner);
    free(decoder->queries);
    free(decoder->heads_out);
    free(decoder->prepared);
    free(decoder->scores);
    free(decoder);
}

/* NULL when memory is short. */
EXPORT Decoder *moespac_decoder_new(const Shape *shape, int threads, const char *isa) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (decoder == NULL) return NULL;
    size_t queries = (size_t)(4 * MAX_TOKENS * shape->heads * shape->padded);
    decoder->shape = *shape;
    decoder->isa = find_isa(isa);
    decoder->decoder_isa = find_decoder_isa(decoder->isa);
    decoder->threads = threads;
    decoder->pool = decoder->own = pool_new(threads);
    decoder->normed = allocate((size_t)(4 * MAX_TOKENS * shape->hidden));
    decoder->mixed = allocate((size_t)(4 * MAX_TOKENS * shape->heads * shape->width));
    decoder->queries = allocate(queries);
    decoder->heads_out = allocate((size_t)(4 * threads * shape->padded));
    if (decoder->pool && decoder->normed && decoder->mixed && decoder->queries && decoder->heads_out) {
        memset(decoder->queries, 0, queries); /* what fills a head up stays zero */
        return decoder;
    }
    moespac_decoder_free(decoder);
    return NULL;
}
