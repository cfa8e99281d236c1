/* DISPATCH of a layer's experts in a few calls: its tokens by expert, what of it is there, what the host computes.
 * Twins, in Python: `Groups` (experts/groups.py), `AtHand` (schedule/at_hand.py), `Tier` (schedule/tiers.py). */
#include <math.h>
#include <string.h>

#include "experts.h"
#include "memory.h"
#include "place.h"

/* ---- tokens by expert ------------------------------------------------------------------------------------------- */

/* The tokens of each of a layer's experts: counts (experts), begins (experts), order (routings), one behind the other.
 * Expert e has the rows order[begins[e]] ... order[begins[e] + counts[e] - 1]. */
typedef struct {
    int64_t *counts, *begins, *order;
} Groups;

static Groups groups_at(int64_t *numbers, int64_t experts) {
    return (Groups){numbers, numbers + experts, numbers + 2 * experts};
}

/* `index` (routings) expert numbers; one outside of 0 ... experts - 1 is nobody, and -1 in `routing` (routings), their
 * copy. Fills `numbers` (2 * experts + routings) as Groups; nobody's rows come before and behind the others. Returns how
 * many are somebody's. */
EXPORT int64_t moespac_group(const int64_t *index, int64_t routings, int64_t experts, int64_t *numbers,
                             int64_t *routing) {
    Groups groups = groups_at(numbers, experts);
    int64_t below = 0, begin = 0, within, behind;
    memset(groups.counts, 0, (size_t)experts * sizeof *groups.counts);
    for (int64_t i = 0; i < routings; i++) {
        int64_t expert = index[i];
        routing[i] = expert < 0 || expert >= experts ? -1 : expert;
        if (expert < 0)
            below++;
        else if (expert < experts)
            groups.counts[expert]++;
    }
    begin = below;
    for (int64_t e = 0; e < experts; e++) {
        groups.begins[e] = begin;
        begin += groups.counts[e];
    }
    within = begin - below;
    behind = begin;
    below = 0;
    for (int64_t i = 0; i < routings; i++) {
        if (index[i] < 0)
            groups.order[below++] = i;
        else if (index[i] < experts)
            groups.order[groups.begins[index[i]]++] = i;
        else
            groups.order[behind++] = i;
    }
    for (int64_t e = 0; e < experts; e++) groups.begins[e] -= groups.counts[e];
    return within;
}

/* ---- what is there ---------------------------------------------------------------------------------------------- */

enum { FREE, FILLING, READY };

/* The books of a tier. */
typedef struct {
    int64_t slots;
    uint8_t *ready, *filling; /* (layers * experts) */
    int64_t *slot_of;
    int64_t *expert_in; /* (slots) */
    uint8_t *state;
    int64_t *pins, *free;
    int64_t *counts; /* slots that are free, the first so many of `free`; the most that were in use */
} Shelf;

static int64_t count_ready(const Shelf *shelf, const int64_t *ids, int64_t n) {
    int64_t ready = 0;
    for (int64_t i = 0; i < n; i++) ready += shelf->ready[ids[i]];
    return ready;
}

static void pin(const Shelf *shelf, const int64_t *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) shelf->pins[shelf->slot_of[ids[i]]]++;
}

/* Whether all are ready; if so, they are pinned. */
EXPORT int moespac_pin(const Shelf *shelf, const int64_t *ids, int64_t n) {
    if (count_ready(shelf, ids, n) < n) return 0;
    pin(shelf, ids, n);
    return 1;
}

/* Whether all were pinned; if so, each is once less. */
EXPORT int moespac_release(const Shelf *shelf, const int64_t *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int64_t slot = shelf->slot_of[ids[i]];
        if (slot < 0 || shelf->pins[slot] <= 0) return 0;
    }
    for (int64_t i = 0; i < n; i++) shelf->pins[shelf->slot_of[ids[i]]]--;
    return 1;
}

/* `sorted` (n): those of `ids` (n) that are ready, and after them the others, both in their order. How many are ready. */
static int64_t sort_out(const Shelf *shelf, const int64_t *ids, int64_t n, int64_t *sorted) {
    int64_t ready = 0, missing = count_ready(shelf, ids, n);
    for (int64_t i = 0; i < n; i++) sorted[shelf->ready[ids[i]] ? ready++ : missing++] = ids[i];
    return ready;
}

/* The same, and those that are ready are pinned. */
EXPORT int64_t moespac_sort_out(const Shelf *shelf, const int64_t *ids, int64_t n, int64_t *sorted) {
    int64_t ready = sort_out(shelf, ids, n, sorted);
    pin(shelf, sorted, ready);
    return ready;
}

/* slots (n) of `ids`; returns the tokens of all. `counts` are those of the experts from `first_id` on. */
EXPORT int64_t moespac_look_up(const Shelf *shelf, const int64_t *ids, int64_t n, const int64_t *counts,
                               int64_t first_id, int64_t *slots) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        slots[i] = shelf->slot_of[ids[i]];
        tokens += counts[ids[i] - first_id];
    }
    return tokens;
}

/* A job is over: what each of its experts took is learned, and they are released; whether they were pinned. */
EXPORT int moespac_job_is_over(const Shelf *shelf, const int64_t *ids, int64_t n, Curve *curve, int64_t tokens,
                               double seconds) {
    double each = rint((double)tokens / (double)n), share = seconds / (double)n;
    int64_t one = each < 1 ? 1 : (int64_t)each;
    moespac_observe(curve, &one, &share, 1);
    return moespac_release(shelf, ids, n);
}

/* Experts of one device in a layer, and what `moespac_take` says of them. */
typedef struct {
    const Shelf *shelf;
    const int64_t *ids;
    int64_t n;
    int64_t ready, all_tokens; /* how many are; of all together */
    int64_t *slots, *tokens;   /* (n) */
} Share;

static void take(Share *share, const int64_t *counts, int64_t first_id) {
    pin(share->shelf, share->ids, share->n);
    share->all_tokens = 0;
    for (int64_t i = 0; i < share->n; i++) {
        share->slots[i] = share->shelf->slot_of[share->ids[i]];
        share->tokens[i] = counts[share->ids[i] - first_id];
        share->all_tokens += share->tokens[i];
    }
}

/* Whether all of all shares are ready; if so, they are pinned. `counts` are the tokens of the experts from `first_id` on. */
EXPORT int moespac_take(Share *shares, int64_t devices, const int64_t *counts, int64_t first_id) {
    int all = 1;
    for (int64_t d = 0; d < devices; d++) {
        shares[d].ready = count_ready(shares[d].shelf, shares[d].ids, shares[d].n);
        all &= shares[d].ready == shares[d].n;
    }
    if (!all) return 0;
    for (int64_t d = 0; d < devices; d++) take(&shares[d], counts, first_id);
    return 1;
}

/* moespac_place, and what it says to `order` is taken at once: the host's share is shares[0]. The tables of costs know so
 * many tokens. */
EXPORT int moespac_place_and_take(Places *places, Share *shares, const int64_t *counts, int64_t first_id,
                                  int64_t *order) {
    int64_t there = moespac_place(places, first_id, counts, order);
    shares[0].ids = order + there;
    shares[0].n = places->active - there;
    shares[1].ids = order;
    shares[1].n = there;
    return moespac_take(shares, 2, counts, first_id);
}

/* What was taken is computed, and took `seconds` (n): that is learned, and it is released; whether it was pinned. */
EXPORT int moespac_computed(const Share *share, Curve *curve, const double *seconds) {
    moespac_observe(curve, share->tokens, seconds, share->n);
    return moespac_release(share->shelf, share->ids, share->n);
}

/* What it is worth to keep an expert: its layer has run (it is before `first`), or is to come. */
typedef struct {
    const double *ran, *to_come;
    int64_t first;
} Retention;

/* `victims` (n): the slots of those ready records that are retained least of all that nobody has pinned, the least first, the
 * first of equals. How many there are. */
static int64_t find_victims(const Shelf *shelf, const Retention *retention, int64_t n, int64_t *victims) {
    double values[n + 1];
    int64_t found = 0;
    for (int64_t slot = 0; slot < shelf->slots; slot++) {
        if (shelf->state[slot] != READY || shelf->pins[slot]) continue;
        int64_t expert = shelf->expert_in[slot], at = found;
        double value = expert < retention->first ? retention->ran[expert] : retention->to_come[expert];
        if (found < n)
            found++;
        else if (!n || value >= values[--at])
            continue;
        for (; at > 0 && value < values[at - 1]; at--) {
            values[at] = values[at - 1];
            victims[at] = victims[at - 1];
        }
        values[at] = value;
        victims[at] = slot;
    }
    return found;
}

/* The expert in the slot that makes way first; -1: none can. */
EXPORT int64_t moespac_victim(const Shelf *shelf, const double *retention) {
    Retention all = {retention, retention, 0};
    int64_t slot;
    return find_victims(shelf, &all, 1, &slot) ? shelf->expert_in[slot] : -1;
}

/* Whether a record may be copied: it is ready in `from`, and nowhere in `to`. */
static int is_to_come(const Shelf *to, const Shelf *from, int64_t expert) {
    return from->ready[expert] && to->slot_of[expert] < 0;
}

/* Take slots of `to` for the records of `ids` (n), which are ready in `from` and are pinned there, and mark them filling:
 * free ones, then those whose records make way. `slots` (n) in `to`, `sources` (n) in `from`. How many have one, the first
 * so many; -1: one of them cannot be copied. */
EXPORT int64_t moespac_reserve(const Shelf *to, const Shelf *from, const int64_t *ids, int64_t n,
                               const Retention *retention, int64_t *slots, int64_t *sources) {
    int64_t *free_slots = &to->counts[0], taken = n < *free_slots ? n : *free_slots;
    for (int64_t i = 0; i < n; i++)
        if (!is_to_come(to, from, ids[i])) return -1;
    for (int64_t i = 0; i < taken; i++) slots[i] = to->free[--*free_slots];
    int64_t victims = find_victims(to, retention, n - taken, slots + taken);
    for (int64_t i = taken; i < taken + victims; i++) {
        int64_t expert = to->expert_in[slots[i]];
        to->ready[expert] = 0;
        to->slot_of[expert] = -1;
    }
    taken += victims;
    for (int64_t i = 0; i < taken; i++) {
        to->slot_of[ids[i]] = slots[i];
        to->expert_in[slots[i]] = ids[i];
        to->state[slots[i]] = FILLING;
        to->filling[ids[i]] = 1;
        sources[i] = from->slot_of[ids[i]];
        from->pins[sources[i]]++;
    }
    int64_t used = to->slots - *free_slots;
    if (used > to->counts[1]) to->counts[1] = used;
    return taken;
}

/* Where some of the accelerator's share is missing: what is there is taken, and slots are reserved for the others. `ids`
 * (n) its share, those first that are there: they are what is left of shares[1]. How many of the others have a slot, or -1:
 * nothing is taken, since the host misses something too. */
EXPORT int64_t moespac_take_and_reserve(Share *shares, const int64_t *counts, int64_t first_id,
                                        const Retention *retention, int64_t *ids, int64_t *slots, int64_t *sources) {
    Share *mine = &shares[0], *its = &shares[1];
    int64_t all = its->n;
    if (count_ready(mine->shelf, mine->ids, mine->n) < mine->n) return -1;
    for (int64_t i = 0; i < all; i++)
        if (!its->shelf->ready[its->ids[i]] && !is_to_come(its->shelf, mine->shelf, its->ids[i])) return -1;
    its->n = sort_out(its->shelf, its->ids, all, ids);
    its->ids = ids;
    take(mine, counts, first_id);
    take(its, counts, first_id);
    return moespac_reserve(its->shelf, mine->shelf, ids + its->n, all - its->n, retention, slots, sources);
}

/* ---- what an accelerator computes -------------------------------------------------------------------------------- */

/* Twin of `make_jobs_in_python` in experts/grouped/jobs.py: each of `n` experts' rows as jobs of up to `tokens`, a slot and
 * then rows, filled up with -1. `jobs` has room for n + (all rows) / tokens of them; returns how many there are. */
EXPORT int64_t moespac_make_jobs(const int64_t *slots, const int64_t *rows, const int64_t *begins, const int64_t *counts,
                                 int64_t n, int64_t tokens, int32_t *jobs) {
    int32_t *next = jobs;
    for (int64_t e = 0; e < n; e++)
        for (int64_t done = 0; done < counts[e]; done += tokens) {
            *next++ = (int32_t)slots[e];
            for (int64_t i = done; i < done + tokens; i++)
                *next++ = i < counts[e] ? (int32_t)rows[begins[e] + i] : -1;
        }
    return (next - jobs) / (1 + tokens);
}

/* ---- what the host computes ------------------------------------------------------------------------------------- */

/* As moespac_kernel_run, for the experts `ids` (jobs) of a layer of `experts`, the first of which is `first_id`;
 * `numbers`: what moespac_group made of its routing. On several threads at once, an expert costs the layer its share of
 * the time that all took: `seconds` are such shares. */
EXPORT int moespac_run_share(Kernel *kernel, const float *x, int64_t tokens, int64_t top_k, const char *arena,
                             int64_t record_bytes, int64_t jobs, const int64_t *slots, const int64_t *ids,
                             int64_t first_id, int64_t experts, int64_t *numbers, float *out, double *seconds) {
    Groups groups = groups_at(numbers, experts);
    int64_t begins[jobs + 1], counts[jobs + 1];
    double start = now(), sum = 0.0;
    for (int64_t job = 0; job < jobs; job++) {
        begins[job] = groups.begins[ids[job] - first_id];
        counts[job] = groups.counts[ids[job] - first_id];
    }
    if (kernel_run(kernel, x, tokens, top_k, arena, record_bytes, jobs, slots, groups.order, begins, counts, out,
                   seconds, NULL))
        return -1;
    for (int64_t job = 0; job < jobs; job++) sum += seconds[job];
    double share = (now() - start) / (sum > 1e-9 ? sum : 1e-9);
    for (int64_t job = 0; job < jobs; job++) seconds[job] *= share;
    return 0;
}
