/* What experts take, by tokens. */
#ifndef MOESPAC_COSTS_H
#define MOESPAC_COSTS_H

#include <stdint.h>

/* At tokens of 1, 2, 4 ... (buckets), from the latest measurements of each; linear between and beyond them. */
typedef struct {
    int64_t buckets, samples, entries; /* how many are kept of each bucket; entries of the table */
    int64_t redraw;                    /* measurements, at most, before the curve follows them */
    int64_t measured, due;             /* how many have come; at how many it is drawn anew */
    double first, further;             /* seconds of one token, and of each token after it, before any measurement */
    double far;                        /* tokens: where its last piece ends */
    const double *shape, *prior;       /* (buckets) seconds by those; and where the curve goes without measurements */
    double *latest;                    /* (buckets, samples), each a ring, scaled to the bucket's tokens */
    int64_t *seen;                     /* (buckets) how many have come */
    double *seconds;                   /* (buckets + 1) the curve, and its end */
    double *table;                     /* (entries) seconds of 0, 1 ... tokens */
} Curve;

/* Experts (n) took `seconds` for so many `tokens`. */
void moespac_observe(Curve *curve, const int64_t *tokens, const double *seconds, int64_t n);

/* Up to date. */
const double *curve_table(Curve *curve);

#endif
