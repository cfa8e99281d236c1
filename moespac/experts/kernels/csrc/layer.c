/* The experts of one layer: those that are in host memory are computed while the others are read. What
 * schedule/layer.py does, where there is no accelerator. */
#include <string.h>

#include "memory.h"
#include "pass.h"

enum { MISSING, FLYING, READY, COMPUTED };

/* The experts of a layer that are routed to, the lowest number first, and their rows of the outputs. */
typedef struct {
    int64_t jobs;
    int64_t *experts, *state;        /* flat ids */
    int64_t *begins, *counts, *rows; /* of job j: rows[begins[j]] ... */
} Groups;

/* Those of them that are computed at once. */
typedef struct {
    int64_t jobs;
    int64_t *slots, *begins, *counts;
} Batch;

static Groups group(const Model *model, const Experts *experts, const Run *run, int64_t routings) {
    const int64_t *index = run->index + run->row * routings;
    int64_t *next = model->numbers, *part = next + experts->experts;
    Groups groups = {0, part, part + routings, part + 2 * routings, part + 3 * routings, part + 4 * routings};
    memset(next, 0, (size_t)(8 * experts->experts));
    for (int64_t i = 0; i < routings; i++) next[index[i]]++;
    for (int64_t e = 0, begin = 0; e < experts->experts; e++) {
        int64_t count = next[e];
        if (!count) continue;
        groups.experts[groups.jobs] = run->row * experts->experts + e;
        groups.state[groups.jobs] = MISSING;
        groups.begins[groups.jobs] = begin;
        groups.counts[groups.jobs++] = count;
        next[e] = begin;
        begin += count;
    }
    for (int64_t i = 0; i < routings; i++) groups.rows[next[index[i]]++] = i;
    return groups;
}

/* The time since `start` went there; how long it was. */
static double spend(Run *run, int waiting, double start) {
    double seconds = now() - start;
    Slice *last = run->slice_count ? &run->slices[run->slice_count - 1] : NULL;
    if (last && last->row == (double)run->row && last->waiting == (double)waiting)
        last->seconds = start - run->began + seconds - last->start;
    else if (run->slice_count < run->slice_room)
        run->slices[run->slice_count++] = (Slice){(double)run->row, waiting, start - run->began, seconds};
    return seconds;
}

/* The weights that come after these experts, where they are few enough to be kept. */
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

/* Enter the reads that are over; what is there is kept there until it is computed. How many those are, or BROKEN;
 * `rings`: after which to wait for more. */
static int64_t take_ready(const Experts *experts, Groups *groups, int64_t *rings) {
    HostMemory *memory = experts->memory;
    int64_t taken = 0;
    if (memory) {
        *rings = moespac_reads_rings(memory->reads);
        if (moespac_memory_settle(memory)) return BROKEN;
    }
    for (int64_t job = 0; job < groups->jobs; job++) {
        int64_t expert = groups->experts[job];
        if (groups->state[job] >= READY || !experts->ready[expert]) continue;
        groups->state[job] = READY;
        if (memory) memory->pins[experts->slots[expert]]++;
        taken++;
    }
    return taken;
}

static int64_t count_in(const Groups *groups, int state) {
    int64_t count = 0;
    for (int64_t job = 0; job < groups->jobs; job++) count += groups->state[job] == state;
    return count;
}

/* Ask for what is missing, as far as there are slots. */
static void fetch(const Experts *experts, const Run *run, Groups *groups) {
    for (int64_t job = 0; job < groups->jobs; job++)
        if (groups->state[job] == MISSING &&
            moespac_memory_demand(experts->memory, run->order, run->row, groups->experts[job]))
            groups->state[job] = FLYING;
}

static void release(const Experts *experts, Groups *groups, int64_t job) {
    groups->state[job] = COMPUTED;
    if (experts->memory) experts->memory->pins[experts->slots[groups->experts[job]]]--;
}

/* All that are ready; but while others wait for a slot, only as many as run at once, to release theirs. */
static int compute(const Model *model, const Experts *experts, Run *run, Groups *groups, Span *span) {
    int64_t routings = run->tokens * model->top_k, *part = groups->rows + routings;
    int64_t most = count_in(groups, MISSING) ? experts->threads : groups->jobs;
    Batch batch = {0, part, part + routings, part + 2 * routings};
    for (int64_t job = 0; job < groups->jobs && batch.jobs < most; job++) {
        if (groups->state[job] != READY) continue;
        batch.slots[batch.jobs] = experts->slots[groups->experts[job]];
        batch.begins[batch.jobs] = groups->begins[job];
        batch.counts[batch.jobs++] = groups->counts[job];
        release(experts, groups, job); /* nobody takes a slot before it is computed */
    }
    double began = now();
    Ahead ahead = weights_ahead(model, run);
    if (kernel_run(experts->kernel, run->normed, run->tokens, model->top_k, experts->arena, experts->record_bytes,
                   batch.jobs, batch.slots, groups->rows, batch.begins, batch.counts, model->outputs, model->seconds,
                   &ahead))
        return 0;
    double seconds = spend(run, 0, began), all = 0.0;
    if (span->tokens) return 1;
    for (int64_t job = 0; job < batch.jobs; job++) all += model->seconds[job];
    span->sample = seconds * model->seconds[0] / all;
    span->tokens = (double)batch.counts[0];
    return 1;
}

/* Ask the routers of the layers to come what they will need. */
static void look_ahead(const Model *model, const Experts *experts, const Run *run) {
    const HostMemory *memory = experts->memory;
    Foresight *foresight = run->order->foresight;
    Known known = {run->order->ran, run->order->to_come, memory->ready, memory->filling};
    const int64_t *index = run->index + run->row * run->tokens * model->top_k;
    int64_t distance = 0;
    moespac_foresight_learn(foresight, known.to_come, run->row, index, run->tokens, model->top_k);
    for (int64_t layer = run->layer + 1; layer < model->layer_count && distance < foresight->layers; layer++) {
        const Layer *next = &model->layers[layer];
        if (next->up.matrix.rows) continue;
        int64_t row = run->row + ++distance;
        float *logits = moespac_foresight_place(foresight, row, distance);
        if (decoder_ask(model->decoder, next, run->x, (int)run->tokens, logits)) return; /* memory is short */
        moespac_foresight_hear(foresight, &known, row, distance, run->tokens, model->top_k);
    }
}

/* Until all are computed; those that are ready were taken, at so many `rings`. */
static int run_all(const Model *model, const Experts *experts, Run *run, Groups *groups, Span *span, int64_t rings) {
    HostMemory *memory = experts->memory;
    for (;;) {
        if (memory && run->order) {
            fetch(experts, run, groups);
            if (!count_in(groups, MISSING)) moespac_memory_pump(memory, run->order, run->row);
        }
        if (count_in(groups, READY)) {
            if (!compute(model, experts, run, groups, span)) return FAILED;
        } else if (count_in(groups, COMPUTED) < groups->jobs) {
            double began = now();
            moespac_reads_wait(memory->reads, rings);
            spend(run, 1, began);
        } else {
            return PAUSED;
        }
        if (take_ready(experts, groups, &rings) < 0) return BROKEN;
    }
}

int run_experts(const Model *model, const Experts *experts, Run *run) {
    int64_t routings = run->tokens * model->top_k, hidden = decoder_shape(model->decoder)->hidden, rings = 0;
    Groups groups = group(model, experts, run, routings);
    HostMemory *memory = experts->memory;
    int64_t hits = take_ready(experts, &groups, &rings);
    if (memory && hits >= 0) moespac_memory_start_layer(memory, run->row, groups.experts, groups.jobs);
    int state = hits < 0 ? BROKEN : hits < groups.jobs && !(memory && run->order) ? ASKS : PAUSED;
    if (state == PAUSED) {
        Span *span = &run->spans[run->row];
        *span = (Span){(double)groups.jobs, (double)hits, 0.0, 0.0};
        if (memory && run->order) {
            moespac_memory_use(run->order, groups.experts, groups.jobs);
            fetch(experts, run, &groups); /* what is late already goes first */
            if (run->order->foresight) look_ahead(model, experts, run);
        }
        state = run_all(model, experts, run, &groups, span, rings);
    }
    for (int64_t job = 0; job < groups.jobs; job++)
        if (groups.state[job] == READY) release(experts, &groups, job);
    if (state == PAUSED)
        moespac_join(model->outputs, run->shares + run->row * routings, run->tokens, model->top_k, hidden, model->block);
    return state;
}
