/* The books of host memory and its flights, where there is no accelerator: what schedule/tiers.py and schedule/memory.py
 * do, over the same arrays. Only the deciding thread comes here. */
#ifndef MOESPAC_HOST_MEMORY_H
#define MOESPAC_HOST_MEMORY_H

#include "foresight.h"
#include "reads.h"

/* Experts are flat ids. */
typedef struct {
    int64_t experts, slots; /* of a layer; of the memory */
    int64_t read_ahead;     /* reads in flight before more are prefetched */
    char *ready, *filling;  /* (layers * experts) */
    int64_t *slot_of;
    int64_t *expert_in; /* (slots) */
    uint8_t *state;
    int64_t *pins, *free;
    int64_t *counts; /* slots that are free, the first so many of `free`; the most that were in use */
    Reads *reads;
    int64_t *ahead; /* prefetches to come: first ... end - 1 */
    int64_t first, end;
    Read *landed; /* reads that are over, since the caller looked last */
    int64_t landings, room;
} HostMemory;

/* What it is worth to keep an expert: by whether its layer has run in this pass, runs, or is to come; or, of a cache
 * that only uses change, what is in `value`. */
typedef struct {
    const double *ran, *to_come; /* (layers * experts), as all of these */
    double runs;
    Foresight *foresight; /* NULL: routers are not asked early */
    double *value;        /* NULL: there is no such cache */
    const double *once_used;
} Order;

/* Enter the reads that are over in the books. Returns how many failed that a layer waits for. */
int64_t moespac_memory_settle(HostMemory *memory);

/* While `layer` runs (-1: none), which wants `wanted` (n): drop prefetches that are useless now. */
void moespac_memory_start_layer(HostMemory *memory, int64_t layer, const int64_t *wanted, int64_t n);

/* These are used now. */
void moespac_memory_use(const Order *order, const int64_t *ids, int64_t n);

/* Start prefetches, best first, as far as `read_ahead` allows. */
void moespac_memory_pump(HostMemory *memory, const Order *order, int64_t layer);

/* Have `expert` read before all prefetches. 0: no slot is free for it yet. */
int moespac_memory_demand(HostMemory *memory, const Order *order, int64_t layer, int64_t expert);

#endif
