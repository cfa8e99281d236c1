"""A launch's work as one small array: which record, for which rows of the (T * k) buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import address, load_library

NOBODY = -1  # a job's last entries, where its expert has fewer rows


def make_jobs(
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    tokens: int,
) -> NDArray[np.int32]:
    """(jobs, 1 + tokens) int32: a slot, then up to ``tokens`` of its expert's rows.

    Expert j has ``rows[begins[j]:][:counts[j]]``; it gets as many jobs as it takes, one after the other, so that
    they find each other's weights in the cache.
    """
    library = load_library()
    if library is None:
        return make_jobs_in_python(slots, rows, begins, counts, tokens)
    jobs = np.empty((len(slots) + len(rows) // tokens, 1 + tokens), np.int32)
    where = [address(part) for part in (slots, rows, begins, counts)]
    assert slots.dtype == rows.dtype == begins.dtype == counts.dtype == np.int64
    return jobs[: library.moespac_make_jobs(*where, len(slots), tokens, address(jobs))]


def make_jobs_in_python(
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    tokens: int,
) -> NDArray[np.int32]:
    needed = -(-counts // tokens)
    expert = np.repeat(np.arange(len(slots)), needed)  # of each job
    place = np.arange(len(expert)) - np.repeat(needed.cumsum() - needed, needed)  # among its expert's jobs
    within = place[:, None] * tokens + np.arange(tokens)  # (jobs, tokens)
    there = within < counts[expert][:, None]
    jobs = np.full((len(expert), 1 + tokens), NOBODY, np.int32)
    jobs[:, 0] = slots[expert]
    jobs[:, 1:][there] = rows[(begins[expert][:, None] + within)[there]]
    return jobs
