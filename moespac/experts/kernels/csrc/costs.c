/* OBSERVE: what experts took, into a curve by tokens. Twin of `_Curve` in policy/cost.py, to the last bit. */
#include "costs.h"

#include <math.h>

#include "memory.h"

EXPORT void moespac_observe(Curve *curve, const int64_t *tokens, const double *seconds, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int64_t bucket = (int64_t)rint(log2((double)tokens[i]));
        if (bucket >= curve->buckets) bucket = curve->buckets - 1;
        double here = curve->first + curve->further * (double)(tokens[i] - 1);
        int64_t place = bucket * curve->samples + curve->seen[bucket]++ % curve->samples;
        curve->latest[place] = seconds[i] * curve->shape[bucket] / here;
    }
    curve->measured += n;
}

/* Of the latest, of which there are some; the lower one of two. */
static double median(const Curve *curve, int64_t bucket) {
    int64_t n = curve->seen[bucket] < curve->samples ? curve->seen[bucket] : curve->samples;
    double sorted[n];
    for (int64_t i = 0; i < n; i++) {
        double value = curve->latest[bucket * curve->samples + i];
        int64_t at = i;
        for (; at > 0 && value < sorted[at - 1]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = value;
    }
    return sorted[(n - 1) / 2];
}

/* The bucket next to this one that has measurements, the lower one of two; -1: none has. */
static int64_t nearest_measured(const Curve *curve, int64_t bucket) {
    for (int64_t away = 0; away < curve->buckets; away++) {
        if (bucket >= away && curve->seen[bucket - away]) return bucket - away;
        if (bucket + away < curve->buckets && curve->seen[bucket + away]) return bucket + away;
    }
    return -1;
}

/* Through the buckets, and on along the last piece. */
static void draw_nodes(Curve *curve) {
    double medians[curve->buckets], most = 0, *seconds = curve->seconds;
    int64_t last = curve->buckets - 1;
    for (int64_t i = 0; i <= last; i++)
        if (curve->seen[i]) medians[i] = median(curve, i);
    for (int64_t i = 0; i <= last; i++) {
        int64_t known = nearest_measured(curve, i);
        double value = curve->prior[i];
        if (known >= 0) value *= medians[known] / curve->prior[known];
        most = i && most > value ? most : value;
        seconds[i] = most;
    }
    double slope = (seconds[last] - seconds[last - 1]) / ldexp(1, (int)last - 1);
    seconds[last + 1] = seconds[last] + slope * (curve->far - ldexp(1, (int)last));
}

static void fill_table(const Curve *curve) {
    const double *seconds = curve->seconds;
    curve->table[0] = seconds[0];
    for (int64_t bucket = 0, tokens = 1; bucket < curve->buckets && tokens < curve->entries; bucket++) {
        double here = ldexp(1, (int)bucket), next = bucket + 1 < curve->buckets ? 2 * here : curve->far;
        double slope = (seconds[bucket + 1] - seconds[bucket]) / (next - here);
        curve->table[tokens++] = seconds[bucket];
        for (; tokens < curve->entries && (double)tokens < next; tokens++)
            curve->table[tokens] = slope * ((double)tokens - here) + seconds[bucket];
    }
}

EXPORT void moespac_draw(Curve *curve) {
    draw_nodes(curve);
    fill_table(curve);
    int64_t wait = curve->measured / 2 < curve->redraw ? curve->measured / 2 : curve->redraw;
    curve->due = curve->measured + (wait > 1 ? wait : 1);
}

const double *curve_table(Curve *curve) {
    if (curve->measured >= curve->due) moespac_draw(curve);
    return curve->table;
}
