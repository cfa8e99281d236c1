"""When the accelerator's memory runs out, experts make way: they can be fetched again, a KV cache cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from moespac.errors import DeviceMemoryError
from moespac.experts.out_of_memory import is_out_of_memory
from moespac.experts.runtime import ExpertRuntime

log = logging.getLogger(__name__)

T = TypeVar("T")


class Room:
    """Runs what may need memory of the accelerator beside its experts."""

    def __init__(self, runtime: ExpertRuntime, share: float) -> None:
        """``share`` of the slots are given back at first, twice as many each time that this is not enough."""
        self._runtime = runtime
        self._share = share

    def make(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. Where memory runs out, experts make way and ``work`` begins again.

        Raises DeviceMemoryError when one slot is left and memory still does not suffice.
        """
        share = self._share
        while True:
            try:
                return work()
            except Exception as error:
                if self._runtime.memory.accelerator is None or not is_out_of_memory(error):
                    raise
                reason = str(error).split(". ")[0].strip()
            # Out here the error is gone, and with it the frames that kept the failed pass's tensors.
            self._give_back(share, reason)
            share = min(2 * share, 1.0)

    def _give_back(self, share: float, reason: str) -> None:
        self._runtime.abandon_pass()
        given = self._runtime.shrink_accelerator(share)
        tier = self._runtime.memory.accelerator
        assert tier is not None
        if not given:
            raise DeviceMemoryError(
                f"the accelerator's memory is used up with one expert left there ({reason}); "
                "shorten the text, use --lookup in place of a draft model, or decode on the CPU"
            )
        log.warning(
            "the accelerator's memory ran out (%s): %d experts made way (%.1f MB), it holds %d now",
            reason,
            given,
            given * tier.record_bytes / 1e6,
            tier.slots,
        )
