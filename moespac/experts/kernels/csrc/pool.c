#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "pool.h"

struct Pool {
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    int workers; /* threads besides the caller */
    int started; /* of them; the first run starts them */
    pid_t owner; /* threads do not survive a fork: the child starts its own */
    int closing;
    /* The present run; `work` is NULL between runs. */
    void (*work)(void *, int64_t, int);
    void *context;
    int64_t items;
    atomic_int_fast64_t next;
    atomic_int busy; /* workers inside the present run */
    atomic_uint_fast64_t runs;
    atomic_int awake;
    pthread_t threads[];
};

enum { LOOKS = 20 * 1000 }; /* before sleeping: some 100 us, a few times what stands between two runs */

typedef struct {
    Pool *pool;
    int number;
} Worker;

static void pause_(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Look a while whether there is a new run. */
static void look_for_run(Pool *pool, uint64_t seen) {
    for (int i = 0; i < LOOKS && atomic_load(&pool->awake) && atomic_load(&pool->runs) == seen; i++) pause_();
}

static void take_items(Pool *pool, void (*work)(void *, int64_t, int), void *context, int64_t items, int worker) {
    int64_t item;
    while ((item = atomic_fetch_add(&pool->next, 1)) < items) work(context, item, worker);
}

static void *worker_main(void *argument) {
    Worker self = *(Worker *)argument;
    Pool *pool = self.pool;
    uint64_t seen = 0;
    free(argument);
    pthread_mutex_lock(&pool->lock);
    while (!pool->closing) {
        if (pool->work == NULL || pool->runs == seen) {
            uint64_t runs = pool->runs;
            pthread_mutex_unlock(&pool->lock);
            look_for_run(pool, runs);
            pthread_mutex_lock(&pool->lock);
            if (pool->runs == runs && !pool->closing) pthread_cond_wait(&pool->wake, &pool->lock);
            continue;
        }
        seen = pool->runs;
        pool->busy++;
        pthread_mutex_unlock(&pool->lock);
        take_items(pool, pool->work, pool->context, pool->items, self.number);
        pthread_mutex_lock(&pool->lock);
        if (--pool->busy == 0) pthread_cond_signal(&pool->idle);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void start_workers(Pool *pool) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for the interpreter's threads */
    while (pool->started < pool->workers) {
        Worker *worker = malloc(sizeof *worker);
        if (worker == NULL) break;
        *worker = (Worker){pool, pool->started + 1};
        if (pthread_create(&pool->threads[pool->started], NULL, worker_main, worker) != 0) {
            free(worker);
            break; /* the caller and those that started do the work */
        }
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void set_up(Pool *pool) {
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    pool->started = pool->busy = 0;
    pool->work = NULL;
    pool->owner = getpid();
}

Pool *pool_new(int threads) {
    int workers = threads > 1 ? threads - 1 : 0;
    Pool *pool = calloc(1, sizeof *pool + (size_t)workers * sizeof(pthread_t));
    if (pool == NULL) return NULL;
    pool->workers = workers;
    set_up(pool);
    return pool;
}

void pool_free(Pool *pool) {
    if (pool->owner == getpid()) {
        pthread_mutex_lock(&pool->lock);
        pool->closing = 1;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->started; i++) pthread_join(pool->threads[i], NULL);
    }
    free(pool);
}

void pool_stay_awake(Pool *pool, int awake) { atomic_store(&pool->awake, awake); }

void pool_run(Pool *pool, void (*work)(void *, int64_t, int), void *context, int64_t items) {
    if (pool->workers == 0 || items < 2) {
        for (int64_t item = 0; item < items; item++) work(context, item, 0);
        return;
    }
    if (pool->owner != getpid()) set_up(pool);
    if (pool->started < pool->workers) start_workers(pool);
    pthread_mutex_lock(&pool->lock);
    pool->work = work;
    pool->context = context;
    pool->items = items;
    atomic_store(&pool->next, 0);
    pool->runs++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    take_items(pool, work, context, items, 0);
    pthread_mutex_lock(&pool->lock);
    pool->work = NULL; /* who wakes up only now finds nothing */
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < LOOKS && atomic_load(&pool->awake) && atomic_load(&pool->busy); i++) pause_();
    pthread_mutex_lock(&pool->lock);
    while (pool->busy) pthread_cond_wait(&pool->idle, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
