/* What Python calls: choose an instruction set, and run a layer's experts over a pool of threads. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "experts.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

/* ---- instruction sets ------------------------------------------------------------------------------------------- */

static int machine_has(const Isa *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == &isa_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == &isa_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    (void)isa;
    return 1;
}

const Isa *find_isa(const char *name) {
    static const Isa *const isas[] = {
#if defined(__x86_64__)
        &isa_avx512, &isa_avx2,
#elif defined(__aarch64__)
        &isa_neon,
#endif
        &isa_portable};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        if (machine_has(isas[i]) && (name == NULL || strcmp(name, isas[i]->name) == 0)) return isas[i];
    return NULL;
}

/* The name of what `name` (NULL: the fastest) stands for on this machine, or NULL. */
EXPORT const char *moespac_isa(const char *name) {
    const Isa *isa = find_isa(name);
    return isa ? isa->name : NULL;
}

EXPORT void moespac_gate(const char *isa, const Gate *gate, const float *up, float *out, int64_t width) {
    find_isa(isa)->gate(gate, up, out, width);
}

EXPORT int64_t moespac_read(const char *isa, const char *bytes, int64_t n) { return find_isa(isa)->read(bytes, n); }

/* ---- experts ---------------------------------------------------------------------------------------------------- */

/* Memory of one worker: an expert's intermediate results for MAX_TOKENS tokens. */
typedef struct {
    float *up;      /* (MAX_TOKENS, rows of the up matrix) */
    float *inner;   /* (width) */
    char *prepared; /* (MAX_TOKENS, bytes of the down matrix's activations) */
} Scratch;

struct Kernel {
    Expert expert;
    const Isa *isa;
    Pool *pool;
    int threads;
    Scratch *scratch; /* one a worker */
    size_t up_bytes, down_bytes; /* of one token's activations */
    char *prepared;   /* of the present call's tokens */
    size_t prepared_capacity;
    struct Item *items;
    size_t items_capacity;
    pthread_mutex_t turn; /* one call at a time: the memory above is shared */
};

/* Some tokens of one expert: what a worker takes at once. */
typedef struct Item {
    int64_t job, begin, count;
    double seconds;
} Item;

/* Arguments of the present call. */
typedef struct {
    Kernel *kernel;
    const float *x;
    int64_t tokens, top_k;
    const char *arena;
    int64_t record_bytes;
    const int64_t *slots, *rows;
    float *out;
    int64_t items;
    const Ahead *ahead;
} Call;

enum {
    PIECE = 32 << 10,     /* bytes fetched ahead at once: some 2 us */
    AHEAD_MOST = 1 << 20, /* what stays in the second caches of two cores; more would be fetched twice */
};

EXPORT void moespac_kernel_free(Kernel *kernel) {
    if (kernel->pool) pool_free(kernel->pool);
    for (int i = 0; kernel->scratch && i < kernel->threads; i++) {
        free(kernel->scratch[i].up);
        free(kernel->scratch[i].inner);
        free(kernel->scratch[i].prepared);
    }
    free(kernel->scratch);
    free(kernel->prepared);
    free(kernel->items);
    free(kernel);
}

/* NULL when memory is short. */
EXPORT Kernel *moespac_kernel_new(const Expert *expert, int threads, const char *isa) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL) return NULL;
    kernel->expert = *expert;
    kernel->isa = find_isa(isa);
    kernel->threads = threads;
    kernel->up_bytes = kernel->isa->prepared_bytes(&expert->up);
    kernel->down_bytes = kernel->isa->prepared_bytes(&expert->down);
    pthread_mutex_init(&kernel->turn, NULL);
    kernel->pool = pool_new(threads);
    kernel->scratch = calloc((size_t)threads, sizeof *kernel->scratch);
    int complete = kernel->pool && kernel->scratch;
    for (int i = 0; complete && i < threads; i++) {
        Scratch *scratch = &kernel->scratch[i];
        scratch->up = allocate((size_t)(MAX_TOKENS * 4 * expert->up.rows));
        scratch->inner = allocate((size_t)(4 * expert->down.columns));
        scratch->prepared = allocate(MAX_TOKENS * kernel->down_bytes);
        complete = scratch->up && scratch->inner && scratch->prepared;
    }
    if (complete) return kernel;
    moespac_kernel_free(kernel);
    return NULL;
}

Pool *kernel_pool(const Kernel *kernel) { return kernel->pool; }

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void prepare_token(void *context, int64_t token, int worker) {
    const Call *call = context;
    const Kernel *kernel = call->kernel;
    (void)worker;
    kernel->isa->prepare(&kernel->expert.up, call->x + token * kernel->expert.up.columns,
                         kernel->prepared + (size_t)token * kernel->up_bytes);
}

static int64_t pieces_of(const Part *part) { return (part->n + PIECE - 1) / PIECE; }

static int64_t pieces_ahead(const Ahead *ahead) {
    int64_t pieces = 0, bytes = 0;
    for (int i = 0; ahead && i < AHEAD_PARTS; i++) {
        pieces += pieces_of(&ahead->parts[i]);
        bytes += ahead->parts[i].n;
    }
    return bytes <= AHEAD_MOST ? pieces : 0;
}

static void fetch_ahead(const Call *call, int64_t piece) {
    const Part *part = call->ahead->parts;
    for (; piece >= pieces_of(part); part++) piece -= pieces_of(part);
    int64_t at = piece * PIECE, left = part->n - at;
    call->kernel->isa->read(part->bytes + at, left < PIECE ? left : PIECE);
}

static void run_item(void *context, int64_t number, int worker) {
    const Call *call = context;
    const Kernel *kernel = call->kernel;
    if (number >= call->items) {
        fetch_ahead(call, number - call->items);
        return;
    }
    const Expert *expert = &kernel->expert;
    const Isa *isa = kernel->isa;
    Scratch *scratch = &kernel->scratch[worker];
    Item *item = &kernel->items[number];
    double start = now();

    const char *record = call->arena + call->slots[item->job] * call->record_bytes;
    const int64_t *rows = call->rows + item->begin;
    int count = (int)item->count;
    const char *prepared[MAX_TOKENS];
    float *out[MAX_TOKENS];
    for (int t = 0; t < count; t++) {
        prepared[t] = kernel->prepared + (size_t)(rows[t] / call->top_k) * kernel->up_bytes;
        out[t] = scratch->up + t * expert->up.rows;
    }
    isa->multiply(&expert->up, record, prepared, count, out);
    for (int t = 0; t < count; t++) {
        char *inner = scratch->prepared + (size_t)t * kernel->down_bytes;
        isa->gate(&expert->gate, out[t], scratch->inner, expert->down.columns);
        isa->prepare(&expert->down, scratch->inner, inner);
        prepared[t] = inner;
        out[t] = call->out + rows[t] * expert->down.rows;
    }
    isa->multiply(&expert->down, record, prepared, count, out);
    item->seconds = now() - start;
}

static int larger_first(const void *a, const void *b) {
    const Item *left = a, *right = b;
    if (left->count != right->count) return left->count < right->count ? 1 : -1;
    return (left->job > right->job) - (left->job < right->job);
}

int kernel_run(Kernel *kernel, const float *x, int64_t tokens, int64_t top_k, const char *arena, int64_t record_bytes,
               int64_t jobs, const int64_t *slots, const int64_t *rows, const int64_t *begins, const int64_t *counts,
               float *out, double *seconds, const Ahead *ahead) {
    int64_t items = 0;
    for (int64_t job = 0; job < jobs; job++) items += (counts[job] + MAX_TOKENS - 1) / MAX_TOKENS;
    Call call = {kernel, x, tokens, top_k, arena, record_bytes, slots, rows, out, items, ahead};
    pthread_mutex_lock(&kernel->turn);
    int fits = reserve((void **)&kernel->prepared, &kernel->prepared_capacity, (size_t)tokens * kernel->up_bytes) &&
               reserve((void **)&kernel->items, &kernel->items_capacity, (size_t)items * sizeof(Item));
    if (fits) {
        int64_t item = 0;
        for (int64_t job = 0; job < jobs; job++) {
            seconds[job] = 0.0;
            for (int64_t done = 0; done < counts[job]; done += MAX_TOKENS) {
                int64_t left = counts[job] - done;
                kernel->items[item++] =
                    (Item){job, begins[job] + done, left < MAX_TOKENS ? left : MAX_TOKENS, 0.0};
            }
        }
        qsort(kernel->items, (size_t)items, sizeof(Item), larger_first);
        if (tokens > MAX_TOKENS)
            pool_run(kernel->pool, prepare_token, &call, tokens);
        else /* some microseconds: less than waking a thread */
            for (int64_t token = 0; token < tokens; token++) prepare_token(&call, token, 0);
        pool_run(kernel->pool, run_item, &call, items + pieces_ahead(ahead));
        for (item = 0; item < items; item++) seconds[kernel->items[item].job] += kernel->items[item].seconds;
    }
    pthread_mutex_unlock(&kernel->turn);
    return fits ? 0 : -1;
}

/* Job j runs the expert in slot slots[j] for rows[begins[j]] ... rows[begins[j] + counts[j] - 1] of `out`
 * (tokens * top_k, hidden); the token of a row is row / top_k. `seconds` (jobs) gets what each took on its thread.
 * Returns 0, or -1 when memory is short; nothing is written then. */
EXPORT int moespac_kernel_run(Kernel *kernel, const float *x, int64_t tokens, int64_t top_k, const char *arena,
                              int64_t record_bytes, int64_t jobs, const int64_t *slots, const int64_t *rows,
                              const int64_t *begins, const int64_t *counts, float *out, double *seconds) {
    return kernel_run(kernel, x, tokens, top_k, arena, record_bytes, jobs, slots, rows, begins, counts, out, seconds,
                      NULL);
}
