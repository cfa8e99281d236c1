/* Experts over a pool of threads (api.c), for a pass over all layers (pass.c). */
#ifndef MOESPAC_EXPERTS_H
#define MOESPAC_EXPERTS_H

#include <stdint.h>

#include "pool.h"

typedef struct Kernel Kernel;

Pool *kernel_pool(const Kernel *kernel);
double now(void); /* seconds */

enum { AHEAD_PARTS = 3 };

typedef struct {
    const char *bytes;
    int64_t n;
} Part;

/* Memory that is read next. Whoever has no expert left to compute fetches it into the caches. */
typedef struct {
    Part parts[AHEAD_PARTS];
} Ahead;

/* As moespac_kernel_run; `ahead` may be NULL. */
int kernel_run(Kernel *kernel, const float *x, int64_t tokens, int64_t top_k, const char *arena, int64_t record_bytes,
               int64_t jobs, const int64_t *slots, const int64_t *rows, const int64_t *begins, const int64_t *counts,
               float *out, double *seconds, const Ahead *ahead);

#endif
