/* A pass of a plain decoder (pass.c), and its experts (layer.c). */
#ifndef MOESPAC_PASS_H
#define MOESPAC_PASS_H

#include "decoder.h"
#include "experts.h"
#include "host_memory.h"

/* The layers, and scratch memory for MAX_TOKENS tokens. */
typedef struct {
    Decoder *decoder;
    const Layer *layers;
    int64_t layer_count, top_k;
    const Weights *head;
    const float *norm, *embedding; /* (hidden), (vocabulary, hidden) */
    float *block;     /* (tokens, hidden) */
    float *outputs;   /* (tokens * top_k, hidden) */
    int64_t *numbers; /* (experts + 8 * tokens * top_k) */
    double *seconds;  /* (tokens * top_k) */
} Model;

/* Where the experts lie. All rows are of a layer that has experts. */
typedef struct {
    Kernel *kernel; /* as many threads as the decoder's; NULL: experts are the caller's */
    int64_t threads;
    const char *arena;
    int64_t record_bytes, experts;
    const int64_t *slots; /* (rows, experts) of the arena */
    const char *ready;    /* (rows, experts): the record is there */
    HostMemory *memory;   /* whose books these are; NULL: nobody moves a record during the call */
} Experts;

/* What a layer's experts were and took: how many; how many were there; the seconds of one of those, and its tokens. */
typedef struct {
    double experts, hits, sample, tokens;
} Span;

/* Where time went, from a moment on that is seconds after the call's begin: computing experts, or waiting for them. */
typedef struct {
    double row, waiting, start, seconds;
} Slice;

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
    Slice *slices;          /* of this call */
    int64_t slice_count, slice_room;
    float *logits;          /* (keep, vocabulary) */
    const Order *order;     /* of the memory in this pass; NULL: a layer that misses an expert is the caller's */
    int64_t layer, row;     /* that come next */
    const float *block;     /* (tokens, hidden), of the last layer: to be added; NULL when it was */
    double began;           /* the call, on the clock of `now` */
} Run;

enum { BROKEN = -2, FAILED, OVER, PAUSED, ASKS };

/* model->block = what the experts that `run` is at make of run->normed: PAUSED, ready for the next layer, or FAILED,
 * ASKS or BROKEN as moespac_pass. */
int run_experts(const Model *model, const Experts *experts, Run *run);

#endif
