/* PLACE: who computes which of a layer's experts, by earliest finish, and what the layer's routing says of their worth.
 * Twins of `place_in_python` in policy/split.py and `freshen_in_python` in policy/balance.py, to the last bit: every sum
 * runs in the same order. */
#include <stdint.h>

#include "memory.h"

enum { ACCELERATOR, ARRIVING, HOST, STORAGE };

typedef struct {
    int64_t total, experts, first_id, slots;       /* of all layers; of this one; its first; of the accelerator */
    const int64_t *counts;                         /* (experts) tokens of each */
    const uint8_t *host, *accelerator, *arriving;  /* (experts) where it is, or goes: to the accelerator; each
                                                    * amid the (total) flags of all layers */
    const double *by_host, *by_accelerator;        /* (table) seconds of an expert with so many tokens */
    int64_t table;
    double link, storage, toll;
    const double *worth, *given_up;                /* (experts), (victims); NULL: only this layer counts */
    int64_t victims;
    int64_t *order;                                /* out: (experts) ids, the accelerator's before the host's */
    int64_t active;                                /* out: how many there are */
} Layer;

typedef struct {
    double pull, by_host, by_accelerator, worth;
    int64_t expert, state;
} Expert;

static double least(double a, double b) { return b < a ? b : a; }
static double most(double a, double b) { return b > a ? b : a; }

static int goes_before(const Expert *a, const Expert *b) {
    return a->state < b->state || (a->state == b->state && a->pull > b->pull);
}

/* The layer's active experts, nearest to the accelerator first, then the most to spare the host; -1: too many tokens. */
static int64_t sort_out(const Layer *layer, Expert *active) {
    int64_t n = 0;
    for (int64_t e = 0; e < layer->experts; e++) {
        int64_t tokens = layer->counts[e];
        if (!tokens) continue;
        if (tokens >= layer->table) return -1;
        Expert one = {.by_host = layer->by_host[tokens], .by_accelerator = layer->by_accelerator[tokens], .expert = e};
        one.state = layer->accelerator[e] ? ACCELERATOR : layer->arriving[e] ? ARRIVING : layer->host[e] ? HOST : STORAGE;
        one.worth = layer->worth && one.state >= HOST ? layer->worth[e] : 0;
        one.pull = one.by_host + one.worth;
        int64_t at = n++;
        for (; at > 0 && goes_before(&one, &active[at - 1]); at--) active[at] = active[at - 1];
        active[at] = one;
    }
    return n;
}

/* rest (n + 1): when the host, undisturbed, is done with all experts but the first 0, 1 ... n. */
static void finish_the_rest(const Layer *layer, const Expert *active, int64_t n, double *rest) {
    int64_t reads = 0;
    for (int64_t i = 0; i < n; i++) reads += active[i].state == STORAGE;
    double work = 0, latest = 0;
    rest[n] = 0;
    for (int64_t i = n; i-- > 0;) {
        work += active[i].by_host;
        latest = most(latest, work + reads * layer->storage); /* earlier reads come first, whoever they serve */
        reads -= active[i].state == STORAGE;
        rest[i] = latest;
    }
}

static int64_t free_slots(const Layer *layer) {
    const uint8_t *there = layer->accelerator - layer->first_id, *arriving = layer->arriving - layer->first_id;
    int64_t used = 0;
    for (int64_t e = 0; e < layer->total; e++) used += there[e] + arriving[e];
    return used < layer->slots ? layer->slots - used : 0;
}

/* What the next copy's slot is worth as it is, `copies` having been made and `empty` slots being free before them. */
static double give_up(const Layer *layer, int64_t empty, int64_t copies) {
    int64_t victim = copies - empty;
    return victim < 0 || victim >= layer->victims ? 0 : layer->given_up[victim];
}

static int64_t best_prefix(const Layer *layer, const Expert *active, int64_t n, const double *rest) {
    double link = layer->link, toll = layer->toll, spared = 1 - 1 / toll;
    double flight = 0, copying, lowest, busy = 0, arrived = 0, read = 0, held_up = 0, saved = 0;
    int64_t best = 0, copies = 0, in_flight = 0, empty = free_slots(layer);
    for (int64_t i = 0; i < n; i++) in_flight += active[i].state == ARRIVING;
    copying = flight = in_flight * link; /* what is in flight arrives, wanted or not; then one copy after the other */
    lowest = least(rest[0] * toll, rest[0] + copying * spared);
    for (int64_t i = 0; i < n && i < layer->slots; i++) {
        double there = 0;
        if (active[i].state == ARRIVING) {
            there = arrived = arrived + link;
        } else if (active[i].state > ARRIVING) {
            if (active[i].state == STORAGE) read += layer->storage;
            held_up = most(most(held_up, read - copies * link), flight);
            saved += active[i].worth - give_up(layer, empty, copies);
            copies++;
            copying += link;
            there = held_up + copies * link;
        }
        busy = most(busy, there) + active[i].by_accelerator;
        double host = least(rest[i + 1] * toll, rest[i + 1] + copying * spared);
        double total = most(host, busy) - saved;
        if (total < lowest) {
            best = i + 1;
            lowest = total;
        }
    }
    return best;
}

/* How many of `order` are the accelerator's; -1: some expert has more tokens than the tables. */
EXPORT int64_t moespac_place(Layer *layer) {
    Expert active[layer->experts];
    double rest[layer->experts + 1];
    int64_t n = sort_out(layer, active);
    if (n < 0) return -1;
    finish_the_rest(layer, active, n, rest);
    for (int64_t i = 0; i < n; i++) layer->order[i] = layer->first_id + active[i].expert;
    layer->active = n;
    return layer->slots ? best_prefix(layer, active, n, rest) : 0;
}

/* `lasting` (experts) rates move by `step` towards what the layer's `tokens` show, and the seconds `saved` (experts) follow:
 * `curve` (steps + 1) has those at rates of 0, 1 / steps ... 1. */
EXPORT void moespac_freshen(const int64_t *counts, int64_t experts, double tokens, float step, const double *curve,
                            int64_t steps, float *lasting, double *saved) {
    for (int64_t e = 0; e < experts; e++) {
        float seen = (float)((double)counts[e] / tokens);
        lasting[e] += step * (seen - lasting[e]);
        double place = (double)lasting[e] * (double)steps;
        int64_t whole = (int64_t)place < steps ? (int64_t)place : steps - 1;
        saved[e] = curve[whole] + (place - (double)whole) * (curve[whole + 1] - curve[whole]);
    }
}
