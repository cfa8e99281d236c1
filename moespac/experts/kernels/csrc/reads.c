#define _GNU_SOURCE
#include "reads.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "experts.h"
#include "memory.h"

enum { QUEUED, RUNNING, OVER };

typedef struct {
    Read read;
    int64_t turn; /* first come, first served */
    int64_t begun, done; /* bytes */
    int state;
} Entry;

struct Reads {
    int fd; /* records by expert, one after the other; -1: the caller reads them */
    const char *known; /* (experts) whose record was seen to be what it should be */
    char *arena;
    int64_t record_bytes, stripe;
    int64_t most_ahead; /* stripes of speculative reads at once: what a layer waits for finds the disk nearly idle */
    pthread_mutex_t lock;
    pthread_cond_t work, bell;
    Entry *entries;  /* (slots) */
    int64_t *flying; /* slots of those in flight */
    int64_t count, turns, rings;
    int64_t ahead; /* stripes of speculative reads that are being read */
    double latest; /* when the last read was over */
    int closed;
};

EXPORT void moespac_reads_free(Reads *reads) {
    free(reads->entries);
    free(reads->flying);
    free(reads);
}

/* NULL when memory is short. */
EXPORT Reads *moespac_reads_new(int fd, const char *known, char *arena, int64_t record_bytes, int64_t slots,
                                int64_t stripe, int64_t most_ahead) {
    Reads *reads = calloc(1, sizeof *reads);
    if (reads == NULL) return NULL;
    reads->fd = fd;
    reads->known = known;
    reads->arena = arena;
    reads->record_bytes = record_bytes;
    reads->stripe = fd < 0 ? record_bytes : stripe;
    reads->most_ahead = most_ahead;
    pthread_mutex_init(&reads->lock, NULL);
    pthread_cond_init(&reads->work, NULL);
    pthread_cond_init(&reads->bell, NULL);
    reads->entries = calloc((size_t)slots, sizeof *reads->entries);
    reads->flying = calloc((size_t)slots, sizeof *reads->flying);
    if (reads->entries && reads->flying) return reads;
    moespac_reads_free(reads);
    return NULL;
}

/* ---- who decides ------------------------------------------------------------------------------------------------ */

EXPORT int64_t moespac_reads_count(const Reads *reads) { return reads->count; }

const Read *reads_flying(const Reads *reads, int64_t number) { return &reads->entries[reads->flying[number]].read; }

void reads_begin(Reads *reads, int64_t expert, int64_t slot, int speculative) {
    pthread_mutex_lock(&reads->lock);
    reads->flying[reads->count++] = slot;
    reads->entries[slot] = (Entry){{expert, slot, speculative, 0, 0, 0.0, 0.0, 0.0}, reads->turns++, 0, 0, QUEUED};
    pthread_cond_signal(&reads->work);
    pthread_mutex_unlock(&reads->lock);
}

void reads_hurry(Reads *reads, int64_t slot) {
    pthread_mutex_lock(&reads->lock);
    reads->entries[slot].read.speculative = 0;
    reads->entries[slot].turn = reads->turns++;
    pthread_cond_signal(&reads->work); /* its stripes are no longer as few at once */
    pthread_mutex_unlock(&reads->lock);
}

static void forget(Reads *reads, int64_t slot) {
    int64_t number = 0;
    while (reads->flying[number] != slot) number++;
    reads->flying[number] = reads->flying[--reads->count];
}

int reads_cancel(Reads *reads, int64_t slot) {
    pthread_mutex_lock(&reads->lock);
    int queued = reads->entries[slot].state == QUEUED;
    if (queued) forget(reads, slot);
    pthread_mutex_unlock(&reads->lock);
    return queued;
}

int64_t reads_collect(Reads *reads, Read *done) {
    int64_t over = 0;
    if (!reads->count) return 0;
    pthread_mutex_lock(&reads->lock);
    for (int64_t number = 0; number < reads->count;) {
        const Entry *entry = &reads->entries[reads->flying[number]];
        if (entry->state == OVER) {
            done[over++] = entry->read;
            reads->flying[number] = reads->flying[--reads->count];
        } else {
            number++;
        }
    }
    pthread_mutex_unlock(&reads->lock);
    return over;
}

EXPORT int64_t moespac_reads_rings(Reads *reads) {
    pthread_mutex_lock(&reads->lock);
    int64_t rings = reads->rings;
    pthread_mutex_unlock(&reads->lock);
    return rings;
}

EXPORT void moespac_reads_wait(Reads *reads, int64_t rings) {
    pthread_mutex_lock(&reads->lock);
    while (reads->rings <= rings) pthread_cond_wait(&reads->bell, &reads->lock);
    pthread_mutex_unlock(&reads->lock);
}

/* ---- who reads -------------------------------------------------------------------------------------------------- */

typedef struct {
    Entry *entry;
    int64_t offset, bytes; /* of the record */
    int speculative;
} Stripe;

static int read_bytes(const Reads *reads, const Read *read, int64_t offset, int64_t bytes) {
    char *into = reads->arena + read->slot * reads->record_bytes;
    int64_t record = read->expert * reads->record_bytes, end = offset + bytes;
    if (reads->fd < 0) return 0;
    while (offset < end) {
        ssize_t n = pread(reads->fd, into + offset, (size_t)(end - offset), record + offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return 0;
        offset += n;
    }
    return 1;
}

/* Of what is left to read, a layer's before all that is speculative; NULL: nothing waits. */
static Entry *next_in_turn(const Reads *reads) {
    Entry *first = NULL;
    for (int64_t number = 0; number < reads->count; number++) {
        Entry *entry = &reads->entries[reads->flying[number]];
        int64_t speculative = entry->read.speculative;
        if (entry->begun == reads->record_bytes || (speculative && reads->ahead >= reads->most_ahead)) continue;
        int earlier = first == NULL || speculative < first->read.speculative ||
                      (speculative == first->read.speculative && entry->turn < first->turn);
        if (earlier) first = entry;
    }
    return first;
}

static int64_t free_lane(const Reads *reads) {
    for (int64_t lane = 0;; lane++) {
        int taken = 0;
        for (int64_t number = 0; number < reads->count; number++) {
            const Entry *entry = &reads->entries[reads->flying[number]];
            taken |= entry->state == RUNNING && entry->read.lane == lane;
        }
        if (!taken) return lane;
    }
}

static Stripe take_stripe(Reads *reads, Entry *entry) {
    int64_t left = reads->record_bytes - entry->begun;
    Stripe stripe = {entry, entry->begun, left < reads->stripe ? left : reads->stripe, entry->read.speculative != 0};
    if (entry->state == QUEUED) {
        entry->read.lane = free_lane(reads);
        entry->read.start = now();
        entry->state = RUNNING;
    }
    entry->begun += stripe.bytes;
    reads->ahead += stripe.speculative;
    if (next_in_turn(reads)) pthread_cond_signal(&reads->work); /* one was woken, and there is more */
    return stripe;
}

static void end(Reads *reads, Entry *entry, int failed) {
    Read *read = &entry->read;
    double end = now();
    read->seconds = end - read->start;
    read->alone = end - (reads->latest > read->start ? reads->latest : read->start);
    read->failed = failed;
    reads->latest = end;
    entry->state = OVER;
    reads->rings++;
    pthread_cond_broadcast(&reads->bell);
}

enum { CLOSED, READ, CHECK };

/* Serve reads until there is one that is the caller's: of `expert` into `slot`. READ: its bytes are still to be read.
 * CHECK: they were, and nobody has looked at them ever. Then call moespac_reads_end. */
EXPORT int moespac_reads_serve(Reads *reads, int64_t *expert, int64_t *slot) {
    int state = CLOSED;
    pthread_mutex_lock(&reads->lock);
    while (!reads->closed && state == CLOSED) {
        Entry *entry = next_in_turn(reads);
        if (entry == NULL) {
            pthread_cond_wait(&reads->work, &reads->lock);
            continue;
        }
        Stripe stripe = take_stripe(reads, entry);
        pthread_mutex_unlock(&reads->lock);
        int filled = read_bytes(reads, &entry->read, stripe.offset, stripe.bytes);
        pthread_mutex_lock(&reads->lock);
        reads->ahead -= stripe.speculative;
        entry->done += stripe.bytes;
        entry->read.failed |= !filled;
        if (entry->done < reads->record_bytes) continue;
        *expert = entry->read.expert;
        *slot = entry->read.slot;
        if (entry->read.failed)
            state = READ;
        else if (!reads->known[*expert])
            state = CHECK;
        else
            end(reads, entry, 0);
    }
    pthread_mutex_unlock(&reads->lock);
    return state;
}

EXPORT void moespac_reads_end(Reads *reads, int64_t slot, int failed) {
    pthread_mutex_lock(&reads->lock);
    end(reads, &reads->entries[slot], failed);
    pthread_mutex_unlock(&reads->lock);
}

/* Who serves comes back; what is queued is taken by nobody any more. */
EXPORT void moespac_reads_close(Reads *reads) {
    pthread_mutex_lock(&reads->lock);
    reads->closed = 1;
    pthread_cond_broadcast(&reads->work);
    pthread_mutex_unlock(&reads->lock);
}
