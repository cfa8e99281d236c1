#include "foresight.h"

#include <math.h>

#include "ids.h"
#include "memory.h"

/* Of an expert's history: what was never seen is not impossible, and has a logarithm. */
static const double LEAST_WORTH = 0.01;

static int64_t cell(const Foresight *foresight, int64_t row, int64_t distance) {
    return (distance - 1) * foresight->layers + row % foresight->layers;
}

EXPORT float *moespac_foresight_place(const Foresight *foresight, int64_t row, int64_t distance) {
    return foresight->margins + cell(foresight, row, distance) * foresight->room * foresight->experts;
}

static double history(double to_come) { return log(to_come > LEAST_WORTH ? to_come : LEAST_WORTH); }

static double chance(const double *weights, double margin, double history) {
    return 1.0 / (1.0 + exp(-(weights[0] * margin + weights[1] * history + weights[2])));
}

EXPORT void moespac_foresight_learn(Foresight *foresight, const double *to_come, int64_t row, const int64_t *index,
                                    int64_t tokens, int64_t top_k) {
    int64_t experts = foresight->experts;
    foresight->first = foresight->end_soon = 0;
    for (int64_t distance = 1; distance <= foresight->layers; distance++) {
        if (foresight->heard[cell(foresight, row, distance)] != row) continue;
        const float *margins = moespac_foresight_place(foresight, row, distance);
        double *weights = foresight->weights + 3 * (distance - 1), sums[3] = {0.0, 0.0, 0.0};
        for (int64_t e = 0; e < experts; e++) {
            double known = history(to_come[row * experts + e]);
            for (int64_t t = 0; t < tokens; t++) {
                double margin = margins[t * experts + e];
                double missed = among(index + t * top_k, top_k, e) - chance(weights, margin, known);
                sums[0] += missed * margin;
                sums[1] += missed * known;
                sums[2] += missed;
            }
        }
        for (int i = 0; i < 3; i++) weights[i] += foresight->step * sums[i] / (double)(tokens * top_k);
    }
}

/* The k-th largest of x (n), and the one after it. */
static void largest(const float *x, int64_t n, int64_t k, float *kth, float *next) {
    float above = INFINITY;
    int64_t passed = 0; /* numbers that are `above` or more */
    for (*kth = *next = INFINITY; passed <= k;) {
        float best = -INFINITY;
        int64_t times = 0;
        for (int64_t i = 0; i < n; i++) {
            if (x[i] >= above || x[i] < best) continue;
            times = x[i] > best ? 1 : times + 1;
            best = x[i];
        }
        if (!times) return; /* no more than k of them, or none that is a number */
        if (passed < k && passed + times >= k) *kth = best;
        passed += times;
        above = *next = best;
    }
}

/* In place: how far each is above the middle between the last that is chosen and the first that is not, in units of
 * how they spread. */
static void to_margins(float *logits, int64_t n, int64_t top_k) {
    double sum = 0.0, squares = 0.0;
    float kth, next;
    largest(logits, n, top_k, &kth, &next);
    for (int64_t i = 0; i < n; i++) sum += logits[i];
    for (int64_t i = 0; i < n; i++) squares += (logits[i] - sum / n) * (logits[i] - sum / n);
    double spread = sqrt(squares / n), middle = 0.5 * ((double)kth + (double)next);
    for (int64_t i = 0; i < n; i++) logits[i] = spread > 0.0 ? (float)((logits[i] - middle) / spread) : 0.0f;
}

static void line_up(Foresight *foresight, int64_t expert, double urgency) {
    int64_t at = foresight->end_soon++;
    for (; at > 0 && foresight->urgency[at - 1] < urgency; at--) {
        foresight->urgency[at] = foresight->urgency[at - 1];
        foresight->soon[at] = foresight->soon[at - 1];
    }
    foresight->urgency[at] = urgency;
    foresight->soon[at] = expert;
}

EXPORT void moespac_foresight_hear(Foresight *foresight, const Known *known, int64_t row, int64_t distance,
                                   int64_t tokens, int64_t top_k) {
    int64_t experts = foresight->experts;
    float *margins = moespac_foresight_place(foresight, row, distance);
    const double *weights = foresight->weights + 3 * (distance - 1);
    double near = pow(foresight->fade, (double)(distance - 1));
    for (int64_t t = 0; t < tokens; t++) to_margins(margins + t * experts, experts, top_k);
    for (int64_t e = 0; e < experts; e++) {
        int64_t expert = row * experts + e;
        double idle = 1.0, seen = history(known->to_come[expert]);
        for (int64_t t = 0; t < tokens; t++) idle *= 1.0 - chance(weights, margins[t * experts + e], seen);
        double need = 1.0 - idle;
        if (need >= foresight->least && !known->ready[expert] && !known->filling[expert])
            line_up(foresight, expert, need * near);
        foresight->worth[expert] = need > known->ran[expert] ? need : known->ran[expert];
    }
    foresight->heard[cell(foresight, row, distance)] = row;
    foresight->end = (row + 1) * experts;
}
