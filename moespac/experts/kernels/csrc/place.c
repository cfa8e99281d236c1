/* PLACE: who computes which of a layer's experts, by earliest finish, and what the layer's routing says of their worth.
 * Twins of `place_in_python` in policy/split.py and `freshen_in_python` in policy/balance.py, to the last bit: every sum
 * runs in the same order. */
#include "place.h"

#include <string.h>

#include "memory.h"

enum { ACCELERATOR, ARRIVING, HOST, STORAGE };

/* What is asked in one layer. */
typedef struct {
    int64_t slots, experts;
    const uint8_t *host, *accelerator, *arriving; /* (experts) */
    const double *by_host, *by_accelerator;       /* (table) seconds of an expert with so many tokens */
    int64_t table, empty;                         /* slots that are free */
    double link, storage, toll;
    const double *worth, *given_up;
    int64_t victims;
} Layer;

/* By how near it is to the accelerator, and by what a copy spares the host. */
typedef struct {
    double pull;
    int32_t state, expert;
} Key;

typedef struct {
    double by_host, by_accelerator, worth;
    int64_t expert, state;
} Expert;

static double least(double a, double b) { return b < a ? b : a; }
static double most(double a, double b) { return b > a ? b : a; }

static int goes_before(const Key *a, const Key *b) {
    return a->state < b->state || (a->state == b->state && a->pull > b->pull);
}

static int state_of(const Layer *layer, int64_t expert) {
    if (layer->accelerator[expert]) return ACCELERATOR;
    return layer->arriving[expert] ? ARRIVING : layer->host[expert] ? HOST : STORAGE;
}

static double worth_of(const Layer *layer, int64_t expert, int state) {
    return layer->worth && state >= HOST ? layer->worth[expert] : 0;
}

/* The layer's active experts, nearest to the accelerator first, then the most to spare the host; -1: too many tokens. */
static int64_t sort_out(const Layer *layer, const int64_t *counts, Expert *active) {
    Key keys[layer->experts];
    int64_t n = 0;
    for (int64_t e = 0; e < layer->experts; e++) {
        if (!counts[e]) continue;
        if (counts[e] >= layer->table) return -1;
        int state = state_of(layer, e);
        Key key = {layer->by_host[counts[e]] + worth_of(layer, e, state), state, (int32_t)e};
        int64_t at = n++;
        for (; at > 0 && goes_before(&key, &keys[at - 1]); at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t e = keys[i].expert, tokens = counts[e];
        double worth = worth_of(layer, e, keys[i].state);
        active[i] = (Expert){layer->by_host[tokens], layer->by_accelerator[tokens], worth, e, keys[i].state};
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

enum { WORD = 8, ADDED = 127 }; /* bytes; words that can be added byte by byte, each byte being 2 at most */

static int64_t free_slots(const Places *places) {
    int64_t used = 0, e = 0;
    while (e + WORD <= places->total) {
        uint64_t sums = 0;
        for (int64_t i = 0; i < ADDED && e + WORD <= places->total; i++, e += WORD) {
            uint64_t there, arriving;
            memcpy(&there, places->accelerator + e, WORD);
            memcpy(&arriving, places->arriving + e, WORD);
            sums += there + arriving;
        }
        for (int64_t i = 0; i < WORD; i++) used += sums >> 8 * i & 255;
    }
    for (; e < places->total; e++) used += places->accelerator[e] + places->arriving[e];
    return used < places->slots ? places->slots - used : 0;
}

/* What the next copy's slot is worth as it is, `copies` having been made. */
static double give_up(const Layer *layer, int64_t copies) {
    int64_t victim = copies - layer->empty;
    return victim < 0 || victim >= layer->victims ? 0 : layer->given_up[victim];
}

static int64_t best_prefix(const Layer *layer, const Expert *active, int64_t n, const double *rest) {
    double link = layer->link, toll = layer->toll, spared = 1 - 1 / toll;
    double flight = 0, copying, lowest, busy = 0, arrived = 0, read = 0, held_up = 0, saved = 0;
    int64_t best = 0, copies = 0, in_flight = 0;
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
            saved += active[i].worth - give_up(layer, copies);
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

static void freshen(const int64_t *counts, int64_t first_id, int64_t experts, const Showing *showing) {
    int64_t steps = showing->steps;
    float *lasting = showing->lasting + first_id;
    double *saved = showing->saved + first_id;
    const double *curve = showing->curve;
    for (int64_t e = 0; e < experts; e++) {
        float seen = (float)((double)counts[e] / showing->tokens);
        lasting[e] += showing->step * (seen - lasting[e]);
        double place = (double)lasting[e] * (double)steps;
        int64_t whole = (int64_t)place < steps ? (int64_t)place : steps - 1;
        saved[e] = curve[whole] + (place - (double)whole) * (curve[whole + 1] - curve[whole]);
    }
}

static Layer layer_of(const Places *places, int64_t first_id) {
    return (Layer){
        .slots = places->slots,
        .experts = places->experts,
        .host = places->host + first_id,
        .accelerator = places->accelerator + first_id,
        .arriving = places->arriving + first_id,
        .by_host = curve_table(places->by_host),
        .by_accelerator = curve_table(places->by_accelerator),
        .table = places->by_host->entries,
        .empty = places->worth ? free_slots(places) : 0,
        .link = places->rates[0],
        .storage = places->rates[1],
        .toll = places->rates[2],
        .worth = places->worth ? places->worth + first_id : NULL,
        .given_up = places->given_up,
        .victims = places->victims,
    };
}

EXPORT int64_t moespac_place(Places *places, int64_t first_id, const int64_t *counts, int64_t *order) {
    if (places->showing) freshen(counts, first_id, places->experts, places->showing);
    Expert active[places->experts];
    double rest[places->experts + 1];
    Layer layer = layer_of(places, first_id);
    int64_t n = sort_out(&layer, counts, active);
    if (n < 0) return -1;
    finish_the_rest(&layer, active, n, rest);
    for (int64_t i = 0; i < n; i++) order[i] = first_id + active[i].expert;
    places->active = n;
    return layer.slots ? best_prefix(&layer, active, n, rest) : 0;
}

EXPORT void moespac_freshen(const int64_t *counts, int64_t first_id, int64_t experts, const Showing *showing) {
    freshen(counts, first_id, experts, showing);
}
