"""Small stand-ins for what tests do not want to be real."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from moespac.types import ModelShape

RECORD_BYTES = 4096


class FakeStore:
    """Records whose every byte follows from the expert's id; reads fail or wait when told to."""

    direct = False

    def __init__(self, layers: int = 3, experts: int = 4) -> None:
        self.shape = ModelShape(layers, experts, top_k=2, record_bytes=RECORD_BYTES)
        self.layout = SimpleNamespace(nbytes=RECORD_BYTES)
        self.failing: set[int] = set()
        self.reads: list[int] = []  # in the order in which they began
        self.gate = threading.Event()  # reads wait for it; set: they run
        self.gate.set()

    def read_into(self, flat_id: int, buffer: NDArray[np.uint8]) -> None:
        self.reads.append(flat_id)
        self.gate.wait()
        if flat_id in self.failing:
            buffer[:] = 0xEE
            raise OSError(5, "Input/output error")
        buffer[:] = self.pattern(flat_id)

    @staticmethod
    def pattern(flat_id: int) -> int:
        return flat_id % 251 + 1

    def close(self) -> None:
        self.gate.set()
