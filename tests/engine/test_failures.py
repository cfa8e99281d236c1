"""A failing disk in mid-decode: a typed error, nothing pinned, and the engine goes on afterwards."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import moespac
from moespac.errors import StorageError
from tests.families import reference_tokens, save_checkpoint

PROMPT = (5, 17, 3, 60)


class FailingStore:
    """A store whose reads fail while ``broken``; everything else is the real one's."""

    def __init__(self, store) -> None:
        self._store = store
        self.broken = False
        self.after = 0  # reads that still succeed once broken

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def read_into(self, flat_id: int, buffer) -> None:
        if self.broken:
            self.after -= 1
            if self.after < 0:
                raise OSError(5, "Input/output error")
        self._store.read_into(flat_id, buffer)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("accelerator", ["none", "20%"])
@pytest.mark.parametrize("after", [0, 7])
def test_a_read_error_is_typed_and_survivable(
    tmp_path, asynchronous: bool, accelerator: str, after: int
) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    settings = {"host_memory": "25%", "accelerator_memory": accelerator, "asynchronous": asynchronous}
    with moespac.load(path, draft="lookup", profile=None, **settings) as engine:
        store = engine.runtime.memory.reader.store = FailingStore(engine.runtime.store)
        stream = engine.stream(PROMPT, max_new_tokens=20)
        engine.step(stream._sequence)
        store.broken, store.after = True, after
        with pytest.raises(StorageError, match="reading expert") as caught:
            list(stream)
        assert "\n" not in str(caught.value)
        memory = engine.runtime.memory
        memory.check_integrity()
        assert not memory.host._pins.any(), "nothing stays pinned"
        store.broken = False
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == reference_tokens(
            "qwen3_moe", PROMPT, 20
        )


def test_a_read_that_fails_once_is_not_noticed(tmp_path) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    with moespac.load(path, draft="none", host_memory="25%", profile=None) as engine:
        store = engine.runtime.memory.reader.store = FailingStore(engine.runtime.store)
        healthy, failures = store.read_into, set()

        def flaky(flat_id: int, buffer: np.ndarray) -> None:
            if flat_id not in failures:
                failures.add(flat_id)
                raise OSError(5, "Input/output error")
            healthy(flat_id, buffer)

        store.read_into = flaky
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == reference_tokens(
            "qwen3_moe", PROMPT, 20
        )
        assert failures


def test_no_thread_outlives_close(tmp_path) -> None:
    path = save_checkpoint("qwen3_moe", tmp_path)
    before = {thread.name for thread in threading.enumerate() if thread.name.startswith("moespac")}
    engine = moespac.load(path, host_memory="25%", accelerator_memory="20%", profile=None)
    engine.generate(PROMPT, max_new_tokens=4)
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("moespac")} > before
    engine.close()
    engine.close()
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("moespac")} == before
