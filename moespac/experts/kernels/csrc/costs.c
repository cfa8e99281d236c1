/* OBSERVE: what experts took, into the latest samples of a curve. Twin of `_Samples.add_in_python` in policy/cost.py. */
#include <math.h>
#include <stdint.h>

#include "memory.h"

/* A curve's samples: at tokens of 1, 2, 4 ... (buckets), scaled in proportion of a prior. */
typedef struct {
    int64_t buckets, samples;
    double first, further; /* the prior's seconds of one token, and of each token after it */
    const double *there;   /* (buckets) the prior's seconds at 1, 2, 4 ... tokens */
    double *latest;        /* (buckets, samples), each a ring */
    int64_t *seen;         /* (buckets) how many have come */
} Samples;

EXPORT void moespac_observe(const Samples *samples, const int64_t *tokens, const double *seconds, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int64_t bucket = (int64_t)rint(log2((double)tokens[i]));
        if (bucket >= samples->buckets) bucket = samples->buckets - 1;
        double here = samples->first + samples->further * (double)(tokens[i] - 1);
        int64_t place = bucket * samples->samples + samples->seen[bucket]++ % samples->samples;
        samples->latest[place] = seconds[i] * samples->there[bucket] / here;
    }
}

EXPORT void moespac_observe_one(const Samples *samples, int64_t tokens, double seconds) {
    moespac_observe(samples, &tokens, &seconds, 1);
}
