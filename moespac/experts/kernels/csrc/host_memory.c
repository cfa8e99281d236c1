#include "host_memory.h"

#include <string.h>

#include "ids.h"
#include "memory.h"

enum { FREE, FILLING, READY };
enum { NOWHERE = -1 };

static void vacate(HostMemory *memory, int64_t expert) {
    int64_t slot = memory->slot_of[expert];
    memory->slot_of[expert] = NOWHERE;
    memory->expert_in[slot] = NOWHERE;
    memory->state[slot] = FREE;
    memory->free[memory->counts[0]++] = slot;
}

/* Experts of the layer that runs are `first` ... `end` - 1. */
static double worth(const Order *order, int64_t expert, int64_t first, int64_t end) {
    const Foresight *foresight = order->foresight;
    if (order->value) return order->value[expert];
    if (expert >= end) return foresight && expert < foresight->end ? foresight->worth[expert] : order->to_come[expert];
    return expert >= first ? order->runs : order->ran[expert];
}

/* A slot for `expert`, which is then filling; the least retained record makes way, but for a speculative read only one
 * that is worth less. Whether there was one. */
static int reserve_slot(HostMemory *memory, const Order *order, int64_t layer, int64_t expert, int speculative) {
    int64_t first = layer < 0 ? 0 : layer * memory->experts, end = layer < 0 ? 0 : first + memory->experts;
    if (!memory->counts[0]) {
        int64_t victim = NOWHERE;
        double least = 0.0;
        for (int64_t slot = 0; slot < memory->slots; slot++) {
            if (memory->state[slot] != READY || memory->pins[slot]) continue;
            double value = worth(order, memory->expert_in[slot], first, end);
            if (victim == NOWHERE || value < least) {
                victim = memory->expert_in[slot];
                least = value;
            }
        }
        if (victim == NOWHERE || (speculative && least >= worth(order, expert, first, end))) return 0;
        memory->ready[victim] = 0;
        vacate(memory, victim);
    }
    int64_t slot = memory->free[--memory->counts[0]], used = memory->slots - memory->counts[0];
    memory->slot_of[expert] = slot;
    memory->expert_in[slot] = expert;
    memory->state[slot] = FILLING;
    memory->filling[expert] = 1;
    if (used > memory->counts[1]) memory->counts[1] = used;
    return 1;
}

static int read_expert(HostMemory *memory, const Order *order, int64_t layer, int64_t expert, int speculative) {
    if (!reserve_slot(memory, order, layer, expert, speculative)) return 0;
    reads_begin(memory->reads, expert, memory->slot_of[expert], speculative);
    return 1;
}

EXPORT int64_t moespac_memory_settle(HostMemory *memory) {
    Read *done = memory->landed + memory->landings;
    int64_t over = reads_collect(memory->reads, done), broken = 0;
    memory->landings += over;
    for (int64_t i = 0; i < over; i++) {
        int64_t expert = done[i].expert;
        memory->filling[expert] = 0;
        if (done[i].failed) {
            vacate(memory, expert);
            broken += !done[i].speculative;
        } else {
            memory->state[memory->slot_of[expert]] = READY;
            memory->ready[expert] = 1;
        }
    }
    return broken;
}

EXPORT void moespac_memory_start_layer(HostMemory *memory, int64_t layer, const int64_t *wanted, int64_t n) {
    int64_t end = (layer + 1) * memory->experts, first = end - memory->experts, kept = memory->first;
    for (int64_t i = memory->first; i < memory->end; i++)
        if (memory->ahead[i] >= end) memory->ahead[kept++] = memory->ahead[i];
    memory->end = kept;
    for (int64_t number = moespac_reads_count(memory->reads) - 1; number >= 0; number--) {
        const Read *read = reads_flying(memory->reads, number);
        int64_t expert = read->expert;
        int useless = read->speculative && expert >= first && expert < end && !among(wanted, n, expert);
        if (useless && reads_cancel(memory->reads, read->slot)) {
            memory->filling[expert] = 0;
            vacate(memory, expert);
        }
    }
}

void moespac_memory_use(const Order *order, const int64_t *ids, int64_t n) {
    if (!order->value) return;
    for (int64_t i = 0; i < n; i++) order->value[ids[i]] = order->once_used[ids[i]];
}

/* Of ids[*first] ... ids[end - 1], as many as may be in flight. */
static void read_ahead(HostMemory *memory, const Order *order, int64_t layer, const int64_t *ids, int64_t *first,
                       int64_t end) {
    while (*first < end && moespac_reads_count(memory->reads) < memory->read_ahead) {
        int64_t expert = ids[(*first)++];
        if (!memory->ready[expert] && !memory->filling[expert]) read_expert(memory, order, layer, expert, 1);
    }
}

EXPORT void moespac_memory_pump(HostMemory *memory, const Order *order, int64_t layer) {
    Foresight *foresight = order->foresight;
    if (foresight) read_ahead(memory, order, layer, foresight->soon, &foresight->first, foresight->end_soon);
    read_ahead(memory, order, layer, memory->ahead, &memory->first, memory->end);
}

EXPORT int moespac_memory_demand(HostMemory *memory, const Order *order, int64_t layer, int64_t expert) {
    if (!memory->filling[expert]) return read_expert(memory, order, layer, expert, 0);
    reads_hurry(memory->reads, memory->slot_of[expert]);
    return 1;
}
