/* A pass of a plain decoder, run on from layer to layer for as long as the experts that its router asks for lie in host
 * memory: there is nothing to wait for then, and nothing that Python would have to decide. */
#include <string.h>

#include "decoder.h"
#include "experts.h"
#include "memory.h"

/* The layers, and scratch memory for MAX_TOKENS tokens. */
typedef struct {
    Decoder *decoder;
    const Layer *layers;
    int64_t layer_count, top_k;
    const Weights *head;
    const float *norm, *embedding; /* (hidden), (vocabulary, hidden) */
    float *block;     /* (tokens, hidden) */
    float *outputs;   /* (tokens * top_k, hidden) */
    int64_t *numbers; /* (experts + 4 * tokens * top_k) */
    double *seconds;  /* (tokens * top_k) */
} Model;

/* Where the experts lie. All rows are of a layer that has experts. */
typedef struct {
    Kernel *kernel; /* as many threads as the decoder's; NULL: experts are the caller's */
    const char *arena;
    int64_t record_bytes, experts;
    const int64_t *slots; /* (rows, experts) of the arena */
    const char *ready;    /* (rows, experts): the record is there; nobody moves it during the call */
} Experts;

/* What a layer's experts took: how many they were, the seconds from the start of the call to their beginning, those of
 * all together, and the part of one of them, which ran for `tokens`. */
typedef struct {
    double experts, start, seconds, sample, tokens;
} Span;

/* One pass, and how far it is. */
typedef struct {
    const int64_t *ids;     /* (tokens), in the vocabulary */
    float *x, *normed;      /* (tokens, hidden): the residual stream, and what a block takes */
    int64_t tokens, keep;
    float *store; /* (layers, 2, groups, room, padded): keys and values up to `start` */
    int64_t room, start;
    const float *cos, *sin; /* (tokens, width) */
    int64_t *index;         /* (rows, tokens, top_k): who was routed to */
    float *shares;          /* beside it */
    Span *spans;            /* (rows), of those that were computed here */
    float *logits;          /* (keep, vocabulary) */
    int64_t layer, row;     /* that come next */
    const float *block;     /* (tokens, hidden), of the last layer: to be added; NULL when it was */
} Run;

enum { FAILED = -1, OVER, PAUSED, ASKS };

/* The experts of a layer that are routed to, the lowest number first: where they lie, and their rows of the outputs. */
typedef struct {
    int64_t jobs;
    int64_t *slots, *begins, *counts, *rows;
} Groups;

static Groups group(const Model *model, int64_t experts, const int64_t *slots, const int64_t *index, int64_t routings) {
    int64_t *next = model->numbers, *part = next + experts;
    Groups groups = {0, part, part + routings, part + 2 * routings, part + 3 * routings};
    memset(next, 0, (size_t)(8 * experts));
    for (int64_t i = 0; i < routings; i++) next[index[i]]++;
    for (int64_t e = 0, begin = 0; e < experts; e++) {
        int64_t count = next[e];
        if (!count) continue;
        groups.slots[groups.jobs] = slots[e];
        groups.begins[groups.jobs] = begin;
        groups.counts[groups.jobs++] = count;
        next[e] = begin;
        begin += count;
    }
    for (int64_t i = 0; i < routings; i++) groups.rows[next[index[i]]++] = i;
    return groups;
}

static int all_ready(const char *ready, const int64_t *index, int64_t routings) {
    for (int64_t i = 0; i < routings; i++)
        if (!ready[index[i]]) return 0;
    return 1;
}

/* The weights that come after the experts that `run` is at, where they are few enough to be kept. */
static Ahead weights_ahead(const Model *model, const Run *run) {
    Ahead ahead = {0};
    if (run->layer + 1 < model->layer_count) {
        const Layer *next = &model->layers[run->layer + 1];
        const Weights *weights[] = {&next->qkv, &next->out, &next->router};
        for (int i = 0; i < AHEAD_PARTS; i++)
            ahead.parts[i] = (Part){weights[i]->base + weights[i]->matrix.values, weights_bytes(weights[i])};
    }
    return ahead;
}

/* model->block = what the experts that `run` is at make of run->normed. */
static int run_experts(const Model *model, const Experts *experts, const Run *run, Span *span) {
    int64_t routings = run->tokens * model->top_k, first = run->row * experts->experts, at = run->row * routings;
    Groups groups = group(model, experts->experts, experts->slots + first, run->index + at, routings);
    double began = now(), all = 0.0;
    Ahead ahead = weights_ahead(model, run);
    if (kernel_run(experts->kernel, run->normed, run->tokens, model->top_k, experts->arena, experts->record_bytes,
                   groups.jobs, groups.slots, groups.rows, groups.begins, groups.counts, model->outputs, model->seconds,
                   &ahead))
        return 0;
    span->experts = (double)groups.jobs;
    span->seconds = now() - began;
    for (int64_t job = 0; job < groups.jobs; job++) all += model->seconds[job];
    span->sample = span->seconds * model->seconds[0] / all;
    span->tokens = (double)groups.counts[0];
    moespac_join(model->outputs, run->shares + at, run->tokens, model->top_k, decoder_shape(model->decoder)->hidden,
                 model->block);
    return 1;
}

static int attend(const Model *model, const Run *run) {
    const Shape *shape = decoder_shape(model->decoder);
    int64_t at = run->row * run->tokens * model->top_k;
    float *store = run->store + run->layer * 2 * shape->groups * run->room * shape->padded;
    return decoder_layer(model->decoder, &model->layers[run->layer], run->x, run->block, (int)run->tokens,
                                 store, run->room, run->start, run->cos, run->sin, run->normed, run->index + at,
                                 run->shares + at) == 0;
}

static int finish(const Model *model, const Run *run) {
    int64_t skipped = (run->tokens - run->keep) * decoder_shape(model->decoder)->hidden;
    return decoder_head(model->decoder, model->head, model->norm, run->x + skipped,
                                run->block ? run->block + skipped : NULL, (int)run->keep, run->logits) == 0;
}

static void embed(const Model *model, const Run *run) {
    int64_t hidden = decoder_shape(model->decoder)->hidden;
    for (int64_t t = 0; t < run->tokens; t++)
        memcpy(run->x + t * hidden, model->embedding + run->ids[t] * hidden, (size_t)(4 * hidden));
}

static int run_on(const Model *model, const Experts *experts, Run *run, int64_t most) {
    int64_t routings = run->tokens * model->top_k, last = run->row + most;
    double began = now();
    if (run->layer == 0) embed(model, run);
    for (; run->layer < model->layer_count; run->layer++) {
        if (run->row == last) return PAUSED;
        if (!attend(model, run)) return FAILED;
        run->block = NULL;
        if (model->layers[run->layer].up.matrix.rows) continue;
        const char *ready = experts->ready + run->row * experts->experts;
        if (!experts->kernel || !all_ready(ready, run->index + run->row * routings, routings)) return ASKS;
        Span *span = &run->spans[run->row];
        span->start = now() - began;
        if (!run_experts(model, experts, run, span)) return FAILED;
        run->block = model->block;
        run->row++;
    }
    return finish(model, run) ? OVER : FAILED;
}

/* Go on with `run`. OVER: its logits are there. PAUSED: experts of `most` layers were computed. ASKS: the experts of
 * run->layer, which are run->row, are the caller's, of run->normed; call again with run->block, and both one further.
 * FAILED: memory is short. */
EXPORT int moespac_pass(const Model *model, const Experts *experts, Run *run, int64_t most) {
    Pool *pool = experts->kernel ? kernel_pool(experts->kernel) : NULL;
    pool = decoder_borrow(model->decoder, pool);
    pool_stay_awake(pool, 1);
    int state = run_on(model, experts, run, most);
    pool_stay_awake(pool, 0);
    decoder_borrow(model->decoder, NULL);
    return state;
}
