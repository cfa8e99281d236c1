/* Reads of experts' records from storage into the slots of host memory: a queue, served by threads of the caller's.
 * One thread decides, which is the only one that begins, hurries, takes back and collects.
 *
 * A record is read in stripes, and whoever is free takes the next stripe of the read that is first in turn: a disk gives
 * its bandwidth to one record, so two at once would both come late; and one that a layer waits for overtakes those that
 * have begun. */
#ifndef MOESPAC_READS_H
#define MOESPAC_READS_H

#include <stdint.h>

typedef struct Reads Reads;

typedef struct {
    int64_t expert, slot;
    int64_t speculative; /* no layer waits for it */
    int64_t failed;
    int64_t lane;          /* of all that are being read at the same time, this one's number */
    double start, seconds; /* from its first stripe to its last */
    double alone;          /* of those, seconds since another was complete: the disk worked on this one */
} Read;

int64_t moespac_reads_count(const Reads *reads);
const Read *reads_flying(const Reads *reads, int64_t number); /* of moespac_reads_count; valid until one begins or ends */

/* At most one a slot. */
void reads_begin(Reads *reads, int64_t expert, int64_t slot, int speculative);

/* A layer waits for the read into `slot`: it goes ahead of all that are speculative. */
void reads_hurry(Reads *reads, int64_t slot);

/* Take the read into `slot` back if nobody has begun with it; whether it was. */
int reads_cancel(Reads *reads, int64_t slot);

/* Those that are over go to `done`, which has room for all in flight; how many they were. */
int64_t reads_collect(Reads *reads, Read *done);

/* A bell rings whenever one is over. */
int64_t moespac_reads_rings(Reads *reads);
void moespac_reads_wait(Reads *reads, int64_t rings); /* until it has rung more often */

#endif
