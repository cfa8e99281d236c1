/* Scratch memory, and what is visible outside of the library. */
#ifndef MOESPAC_MEMORY_H
#define MOESPAC_MEMORY_H

#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

static inline void *allocate(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) == 0 ? memory : NULL;
}

/* Make room for `bytes`; what was there is lost. Returns whether there is room. */
static inline int reserve(void **memory, size_t *capacity, size_t bytes) {
    if (bytes <= *capacity) return 1;
    free(*memory);
    *memory = allocate(bytes);
    *capacity = *memory ? bytes : 0;
    return *memory != NULL;
}

#endif
