/* Lists of ids that are short enough to be gone through. */
#ifndef MOESPAC_IDS_H
#define MOESPAC_IDS_H

#include <stdint.h>

static inline int among(const int64_t *ids, int64_t n, int64_t id) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] == id) return 1;
    return 0;
}

#endif
