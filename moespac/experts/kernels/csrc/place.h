/* Who computes what. */
#ifndef MOESPAC_PLACE_H
#define MOESPAC_PLACE_H

#include "costs.h"

/* What a layer's routing shows: its experts' rates move by `step` towards it, and what they save follows. */
typedef struct {
    double tokens; /* that are routed */
    float step;
    const double *curve; /* (steps + 1) seconds saved at rates of 0, 1 / steps ... 1 */
    int64_t steps;
    float *lasting; /* (total) the rates */
    double *saved;  /* (total) */
} Showing;

/* What is asked in all layers of a pass alike. */
typedef struct {
    int64_t total, experts, slots;                /* of all layers; of one; of the accelerator */
    const uint8_t *host, *accelerator, *arriving; /* (total) where it is, or goes: to the accelerator */
    Curve *by_host, *by_accelerator;
    const double *rates;                          /* seconds of a copy and of a read; the toll of copies on the host */
    const double *worth, *given_up;               /* (total), (victims); NULL: only this layer counts */
    int64_t victims;
    const Showing *showing;                       /* NULL: nothing is learned here */
    int64_t active;                               /* out: experts of the layer that are placed */
} Places;

/* Who computes the experts of a layer, whose first is `first_id`; `counts` (experts) tokens of each. In `order` (experts)
 * their ids, the accelerator's first: so many. -1: some expert has more tokens than the tables. What the layer shows is
 * learned either way. */
int64_t moespac_place(Places *places, int64_t first_id, const int64_t *counts, int64_t *order);

#endif
