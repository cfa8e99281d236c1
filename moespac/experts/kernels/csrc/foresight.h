/* What the routers of layers to come say early: they are asked with the residual stream of the layer that runs, one
 * layer ahead, two, three. How far they can be believed is learned. After Fate (2025), which asks one layer ahead and
 * believes what it hears; ours is to ask further, and to weigh it with the history of each expert. */
#ifndef MOESPAC_FORESIGHT_H
#define MOESPAC_FORESIGHT_H

#include <stdint.h>

/* Experts are flat ids, rows are layers that have experts. */
typedef struct {
    int64_t layers, experts, room; /* asked ahead; of a layer; tokens that there is room for */
    double least;                  /* chance of being needed from which on an expert is read early */
    double fade;                   /* of its urgency, for each layer that it is further away */
    double step;                   /* of learning, for each expert that was needed */
    double *weights; /* (layers, 3) by distance: log odds of being needed, for the margin, the history, and always */
    double *worth;   /* (rows * experts): of those whose routers were asked, the chance of being needed ... */
    int64_t end;     /* ... which end before this id; they begin where the layer that runs ends */
    int64_t *soon;   /* to be read early: first ... end_soon - 1, the most urgent first */
    double *urgency; /* beside it */
    int64_t first, end_soon;
    int64_t *heard; /* (layers, layers) by distance and row: the row whose margins are there; -1: none */
    float *margins; /* (layers, layers, room, experts): by how much a logit is above those that are not chosen */
} Foresight;

/* What is known of experts without their routers, (rows * experts) all of them. */
typedef struct {
    const double *ran, *to_come; /* Order's */
    const char *ready, *filling; /* HostMemory's */
} Known;

/* `row` is routed (index: tokens, top_k): learn from what was said of it, and forget whom to read early. */
void moespac_foresight_learn(Foresight *foresight, const double *to_come, int64_t row, const int64_t *index,
                             int64_t tokens, int64_t top_k);

/* Where the logits (tokens, experts) belong that are asked of `row`, so many rows ahead. */
float *moespac_foresight_place(const Foresight *foresight, int64_t row, int64_t distance);

/* They are there: what they say of its experts. */
void moespac_foresight_hear(Foresight *foresight, const Known *known, int64_t row, int64_t distance, int64_t tokens,
                            int64_t top_k);

#endif
