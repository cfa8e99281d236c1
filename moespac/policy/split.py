"""BALANCE at dispatch: the router has fired, residency is known; who computes which of this layer's experts?

The finish times that are minimised:
- the host computes one expert after the other, those in its memory first, then as reads arrive;
- the accelerator computes what it holds, then what is arriving, then what the link copies, one by one;
- a copy reads the host's memory, so the host computes slower beside it (``CostModel.copy_toll``);
- storage reads one record after the other, for the accelerator (which has the longer way) before the host.

A copy that is made for this layer stays: what it saves in passes to come (``Stakes``) is set against the time that
it takes now. Of two assignments that finish nearly together, that one is taken which leaves the better memory.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.config import BalanceConfig
from moespac.policy.cost import CostModel, Seconds
from moespac.types import Ids, Placement, Residency


class State(IntEnum):
    """Where an expert is when its layer is dispatched, the nearest to the accelerator first."""

    ACCELERATOR = 0
    ARRIVING = 1  # on its way to the accelerator; a complete copy is in host memory
    HOST = 2
    STORAGE = 3


_ARRIVING, _STORAGE = int(State.ARRIVING), int(State.STORAGE)  # an enumeration's members are slow to look up


class Stakes(NamedTuple):
    """What copies change beyond the layer that they are made for, in seconds saved in passes to come."""

    worth: Seconds  # (n,) of having each expert on the accelerator
    given_up: Seconds  # (m,) of the experts that make way, the first to go first


def place_by_finish(
    layer: int,
    counts: NDArray[np.int64],
    residency: Residency,
    costs: CostModel,
    config: BalanceConfig,
    worth: Seconds | None = None,
) -> Placement:
    """The placement of ``layer``'s active experts by earliest finish: what is near first, then the most work.

    ``worth`` (layers * experts,) is what each expert saves in passes to come while it is on the accelerator,
    seconds; None: only this layer counts.
    """
    active = np.flatnonzero(counts)
    if not residency.capacity.accelerator and residency.host[layer, active].all():
        return Placement(layer * len(counts) + active)
    tokens, states = counts[active], _states(layer, active, residency)
    ids = layer * len(counts) + active
    missed = states >= State.HOST
    pull = -tokens.astype(np.float64)
    if worth is not None and missed.any():
        pull[missed] = -(costs.host_expert(tokens[missed]) + worth[ids[missed]])
    ordered = np.lexsort((pull, states))
    ids, tokens, states = ids[ordered], tokens[ordered], states[ordered]
    slots = residency.capacity.accelerator
    if not slots:
        return Placement(ids)
    stakes = None
    if worth is not None and len(ids) and states[-1] >= State.HOST:
        copies = int(np.count_nonzero(states >= State.HOST))
        stakes = Stakes(worth[ids], _least(worth, ids, residency, copies))
    there = split(tokens, states, costs, config, slots, stakes)
    return Placement(host=ids[~there], accelerator=ids[there])


def _least(worth: Seconds, active: Ids, residency: Residency, number: int) -> Seconds:
    """What the next ``number`` slots that copies take are worth as they are: free ones nothing."""
    held = residency.accelerator.ravel()
    used = np.count_nonzero(held) + np.count_nonzero(residency.arriving_accelerator)
    free = min(max(residency.capacity.accelerator - int(used), 0), number)
    values = np.where(held, worth, np.inf)
    values[active] = np.inf  # in use now: nothing is taken from the layer that runs
    least = values if len(values) <= number else np.partition(values, number - 1)[:number]
    least = np.sort(least)
    return np.concatenate([np.zeros(free), least[: np.searchsorted(least, np.inf)]])[:number]


def _states(layer: int, active: Ids, residency: Residency) -> NDArray[np.int64]:
    """(n,) the ``State`` of each active expert of ``layer``."""
    states = np.where(residency.host[layer, active], State.HOST.value, State.STORAGE.value)
    states[residency.arriving_accelerator[layer, active]] = State.ARRIVING.value
    states[residency.accelerator[layer, active]] = State.ACCELERATOR.value
    return states


def split(
    counts: NDArray[np.int64],
    states: NDArray[np.int64],
    costs: CostModel,
    config: BalanceConfig,
    slots: int,
    stakes: Stakes | None = None,
) -> NDArray[np.bool_]:
    """Which experts the accelerator computes, (n,): the assignment of least makespan, less what copies are worth.

    ``counts`` (n,) tokens of each active expert, ``states`` (n,) its ``State``, sorted by state, then by
    tokens descending (with ``stakes``: by what a copy spares the host, now and later); at most ``slots`` go to the
    accelerator. Experts that nothing tells apart are alike: assignments are enumerated by how many of each class
    go there: exact while those are at most ``config.exact_splits``, else the best prefix of the experts in
    their order.
    """
    if not len(counts):
        return np.zeros(0, np.bool_)  # some families may route a layer nothing
    differ = (states[1:] != states[:-1]) | (counts[1:] != counts[:-1])
    if stakes is not None:
        differ |= (stakes.worth[1:] != stakes.worth[:-1]) & (states[1:] >= State.HOST)
    if np.count_nonzero(differ) >= config.exact_splits.bit_length():  # each class at least doubles them
        return np.arange(len(counts)) < _best_prefix(counts, states, costs, slots, stakes)
    changes = np.flatnonzero(differ) + 1
    begins = np.concatenate([[0], changes])
    sizes = np.concatenate([changes, [len(counts)]]) - begins
    ways = tuple((sizes + 1).tolist())
    if math.prod(ways) > config.exact_splits:
        return np.arange(len(counts)) < _best_prefix(counts, states, costs, slots, stakes)
    choices = _all_choices(ways)
    if len(counts) > slots:
        choices = choices[choices.sum(axis=1) <= slots]
    seconds = makespans(choices, sizes, counts[begins], states[begins], costs)
    if stakes is not None:
        copied = choices[:, states[begins] >= State.HOST]
        given_up = np.concatenate([[0.0], np.cumsum(stakes.given_up)])
        number = np.minimum(copied.sum(axis=1), len(given_up) - 1)
        seconds += given_up[number] - copied @ stakes.worth[begins][states[begins] >= State.HOST]
    best = choices[seconds.argmin()]
    return np.arange(len(counts)) < np.repeat(begins + best, sizes)


@functools.lru_cache(maxsize=1024)
def _all_choices(ways: tuple[int, ...]) -> NDArray[np.int64]:
    """(choices, classes): every combination of 0, 1 ... of each class."""
    return np.stack(np.unravel_index(np.arange(math.prod(ways)), ways), axis=1)


def _best_prefix(
    counts: NDArray[np.int64],
    states: NDArray[np.int64],
    costs: CostModel,
    slots: int,
    stakes: Stakes | None,
) -> int:
    """How many experts, from the first, go to the accelerator: least makespan, less what copies are worth.

    In plain floats, one step an expert: for the dozens that a layer has, arrays take twice as long.
    """
    link, storage = costs.link, costs.storage
    state = states.tolist()
    arriving = state.count(_ARRIVING)
    by_host = _finishes_of_the_rest(costs.host_expert(counts).tolist(), state, storage)
    spared = 1 - 1 / costs.copy_toll  # of each second of copying
    worth = stakes.worth.tolist() if stakes is not None else None
    given_up = stakes.given_up.tolist() if stakes is not None else []

    copying = flight = (
        arriving * link
    )  # what is in flight arrives, wanted or not; then one copy after the other
    host = min(by_host[0] * costs.copy_toll, by_host[0] + copying * spared)
    best, least = 0, host
    busy = arrived = read = held_up = saved = 0.0
    copies = 0
    for number, seconds in enumerate(costs.accelerator_expert(counts[:slots]).tolist(), start=1):
        there, where = 0.0, state[number - 1]
        if where == _ARRIVING:
            there = arrived = arrived + link
        elif where > _ARRIVING:
            if where == _STORAGE:
                read += storage
            held_up = max(held_up, read - copies * link, flight)
            if worth is not None:
                saved += worth[number - 1] - (given_up[copies] if copies < len(given_up) else 0.0)
            copies += 1
            copying += link
            there = held_up + copies * link
        busy = max(busy, there) + seconds
        rest = by_host[number]
        host = min(rest * costs.copy_toll, rest + copying * spared)
        total = max(host, busy) - saved
        if total < least:
            best, least = number, total
    return best


def _finishes_of_the_rest(seconds: list[float], state: list[int], storage: float) -> list[float]:
    """(n + 1) when the host, undisturbed, is done with all experts but the first 0, 1 ... n."""
    finishes = [0.0]
    work = latest = 0.0
    reads = state.count(_STORAGE)
    for one, where in zip(reversed(seconds), reversed(state), strict=True):
        work += one
        # The reads before it come first, whichever device they serve.
        latest = max(latest, work + reads * storage)
        reads -= where == _STORAGE
        finishes.append(latest)
    return finishes[::-1]


def _beside(busy: Seconds, copying: Seconds, toll: float) -> Seconds:
    """When the host is done with ``busy`` seconds of work, of which the first ``copying`` run beside copies."""
    return np.minimum(busy * toll, busy + copying * (1 - 1 / toll))


def makespans(
    choices: NDArray[np.int64],
    sizes: NDArray[np.int64],
    tokens: NDArray[np.int64],
    states: NDArray[np.int64],
    costs: CostModel,
) -> NDArray[np.float64]:
    """(choices,) seconds until both devices are done, if ``choices`` (choices, classes) experts of each class
    go to the accelerator and the rest of its ``sizes`` to the host. Classes are sorted as experts are.

    Within a state experts become available at a steady pace and run by tokens descending, so the time that a
    device is held up is convex along them: only the first and the last of a state matter (``_run``).
    """
    arriving, host, storage = np.searchsorted(states, (1, 2, 3)).tolist()
    there = choices.astype(np.float64)  # small whole numbers, exact; BLAS multiplies no integers
    here = sizes - there
    seconds = costs.host_expert(tokens)
    reads = _number(there[:, storage:])
    by_host = here[:, :storage] @ seconds[:storage]
    by_host = _run(by_host, here[:, storage:], seconds[storage:], [(reads * costs.storage, costs.storage)])

    copying = (sizes[arriving:host].sum() + _number(there[:, host:])) * costs.link
    by_host = _beside(by_host, copying, costs.copy_toll)

    seconds = costs.accelerator_expert(tokens)
    busy = there[:, :arriving] @ seconds[:arriving]
    busy = _run(busy, there[:, arriving:host], seconds[arriving:host], [(0.0, costs.link)])
    link_free = sizes[arriving:host].sum() * costs.link  # what is in flight occupies the link, wanted or not
    busy = _run(busy, there[:, host:storage], seconds[host:storage], [(link_free, costs.link)])
    link_free = link_free + _number(there[:, host:storage]) * costs.link
    # The i-th record from storage is there when the link has copied all before it, or when the first read and
    # i copies are done, or when i reads and a copy are done, whichever is last.
    ways = [(link_free, costs.link), (costs.storage, costs.link), (costs.link, costs.storage)]
    busy = _run(busy, there[:, storage:], seconds[storage:], ways)
    return np.maximum(by_host, busy)


def _run(
    busy: NDArray[np.float64],
    counts: NDArray[np.float64],
    seconds: NDArray[np.float64],
    ways: list[tuple[NDArray[np.float64] | float, float]],
) -> NDArray[np.float64]:
    """When a device that is ``busy`` until then (choices,) is done with experts that come one by one.

    ``counts`` (choices, classes) of them take ``seconds`` (classes,) each, falling; the i-th, from 1, comes
    at the latest of ``begin + i * interval`` over the ``ways``.
    """
    if not counts.size:
        return busy
    computing = counts @ seconds
    number = _number(counts)
    last = np.where(counts > 0, seconds, np.inf).min(axis=1)
    start, end = busy, np.zeros_like(busy)
    for begin, interval in ways:
        start = np.maximum(start, begin + interval)  # held up by the first, then never idle
        end = np.maximum(end, begin + number * interval)  # held up by the last
    done = np.maximum(start + computing, end + last)
    return np.where(number > 0, done, busy)


def _number(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(choices,) experts of all classes; a product with ones takes a third of the time of a sum."""
    return counts @ np.ones(counts.shape[1])
