/* A pool of threads that share out numbered items of work. Idle threads sleep. */
#ifndef MOESPAC_POOL_H
#define MOESPAC_POOL_H

#include <stdint.h>

typedef struct Pool Pool;

/* Of `threads` workers, the caller of pool_run among them. NULL when there is no memory. */
Pool *pool_new(int threads);
void pool_free(Pool *pool);

/* From now on workers look for the next run a while before they sleep, or not. For runs that follow each other closely:
 * to wake a thread takes as long as a small run. */
void pool_stay_awake(Pool *pool, int awake);

/* work(context, item, worker) for each item in 0 ... items - 1, lower numbers first; returns when all are done.
 * `worker` is in 0 ... threads - 1, the caller is 0. One caller at a time. */
void pool_run(Pool *pool, void (*work)(void *context, int64_t item, int worker), void *context, int64_t items);

#endif
