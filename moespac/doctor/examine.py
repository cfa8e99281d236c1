"""All examinations, one after the other. One that fails is a finding, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moespac.doctor.accelerator import check_accelerator
from moespac.doctor.finding import Check, Finding, Place, warn
from moespac.doctor.memory import check_memory, check_page_lock
from moespac.doctor.processor import check_bandwidth, check_kernel, check_processor, check_threads
from moespac.doctor.software import check_extras, check_versions
from moespac.doctor.storage import check_cache, check_storage

CHECKS: tuple[Check, ...] = (
    check_versions,
    check_extras,
    check_processor,
    check_threads,
    check_kernel,
    check_bandwidth,
    check_memory,
    check_page_lock,
    check_accelerator,
    check_storage,
    check_cache,
)


def examine(
    place: Place, progress: Callable[[int, int], None], checks: Sequence[Check] = CHECKS
) -> list[Finding]:
    """What was found, in order; ``progress`` is told how many of how many examinations are over."""
    found: list[Finding] = []
    for done, check in enumerate(checks, start=1):
        try:
            found += check(place)
        except Exception as error:  # machines are odd in ways that nobody listed: say so, and go on
            topic = check.__name__.removeprefix("check_").replace("_", " ")
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found.append(warn(topic, f"could not be examined ({reason})", "please report this line"))
        progress(done, len(checks))
    return found
