"""What goes into a trace comes out; what is no trace is one clear error."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moespac.trace
from moespac.errors import CheckpointError
from moespac.trace import TraceRecorder, load, read, write
from moespac.trace.files import to_bytes
from moespac.types import ModelShape
from tests.trace.small import SHAPE, recorded


@pytest.mark.parametrize("experts", [8, 255, 256, 300])
@pytest.mark.parametrize("weights", [True, False])
def test_passes_come_back_as_they_were_observed(experts: int, weights: bool, tmp_path: Path) -> None:
    trace, seen = recorded(ModelShape(3, experts, 2, record_bytes=1), weights)
    write(tmp_path / "t.npz", trace)
    back = read(tmp_path / "t.npz")
    assert back.categories == ("poetry", "code/python") and back.source == "a test" and back.speculative
    assert back.shape == ModelShape(3, experts, 2, record_bytes=1)
    assert back.routing.dtype == (np.uint8 if experts <= 255 else np.uint16)
    for sequence, expected in enumerate(seen):
        passes = list(back.passes(sequence))
        assert len(passes) == len(expected)
        for found, true in zip(passes, expected, strict=True):
            np.testing.assert_array_equal(found.window.tokens, true.window.tokens)
            np.testing.assert_array_equal(found.routing, true.routing)
            assert found.window.drafted == true.window.drafted
            assert (found.window.prefill, found.accepted) == (true.window.prefill, true.accepted)
            assert (found.routing.dtype, found.window.tokens.dtype) == (np.int64, np.int64)
            if weights:
                np.testing.assert_array_equal(found.weights, true.weights)
            else:
                assert found.weights is None


def test_decoded_tokens_are_those_that_were_kept() -> None:
    trace, seen = recorded()
    single, second, third = seen[0][1:]
    tokens, routing = trace.decode_tokens(0)
    kept = [single.window.tokens, second.window.tokens[:3], third.window.tokens[:1]]
    np.testing.assert_array_equal(tokens, np.concatenate(kept))
    np.testing.assert_array_equal(routing[1:4], second.routing[:, :3].swapaxes(0, 1))
    np.testing.assert_array_equal(trace.decode_tokens(1).tokens, seen[1][1].window.tokens)


def test_the_same_trace_is_the_same_file() -> None:
    assert to_bytes(recorded()[0]) == to_bytes(recorded()[0])


def test_a_cut_file_is_one_error(tmp_path: Path) -> None:
    data, file = to_bytes(recorded()[0]), tmp_path / "t.npz"
    for length in range(0, len(data), 97):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as error:
            load(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    data, file = to_bytes(recorded()[0]), tmp_path / "t.npz"
    found = 0
    for at in range(0, len(data), 5):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            assert to_bytes(load(file)) == data  # a byte that nobody reads: a time stamp
        except CheckpointError as error:
            found += 1
            assert "\n" not in str(error)
    assert found > len(data) / 5 / 2


CHANGES = {
    "routes to an expert that is not there": lambda t: {"routing": np.full_like(t.routing, 8)},
    "routing of another type": lambda t: {"routing": t.routing.astype(np.uint16)},
    "routing without k": lambda t: {"routing": t.routing[:, :, 0]},
    "tokens cut": lambda t: {"tokens": t.tokens[:-1]},
    "weights of another shape": lambda t: {"weights": t.weights[:, :1]},
    "weights not finite": lambda t: {"weights": t.weights * np.float16("nan")},
    "offsets fall": lambda t: {"pass_offsets": t.pass_offsets[[0, 2, 1, 3, 4, 5, 6]]},
    "offsets end early": lambda t: {"sequence_offsets": t.sequence_offsets - [0, 0, 1]},
    "an empty pass": lambda t: {"pass_offsets": t.pass_offsets[[0, 1, 1, 3, 4, 5, 6]]},
    "more accepted than drafted": lambda t: {"accepted": t.drafted + 1},
    "negative acceptance": lambda t: {"accepted": t.accepted - 9},
    "all tokens drafted": lambda t: {"drafted": np.diff(t.pass_offsets).astype(np.int32)},
    "drafts in a prefill": lambda t: {"prefill": np.ones_like(t.prefill)},
    "a category too few": lambda t: {"categories": t.categories[:1]},
    "no experts": lambda t: {"experts": 0},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_arrays_that_do_not_fit_are_refused(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trace, _ = recorded()
    write(tmp_path / "t.npz", dataclasses.replace(trace, **change(trace)))
    with pytest.raises(CheckpointError, match="cannot be used"):
        read(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"format": "moespac-trace", "version": 99}, "version 99"),
        ({"format": "another", "version": 1}, "another version 1"),
        ({"format": "moespac-trace", "version": 1}, "'experts' is missing"),
        ([], "cannot be used"),
    ],
)
def test_another_format_is_refused(header: object, reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", header=np.array(json.dumps(header)))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "t.npz")


def test_what_is_no_npz_or_not_there_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "pickle.npz", header=np.array([{}], dtype=object))
    for name in ("array.npy", "text.npz", "pickle.npz", "missing.npz", "."):
        with pytest.raises(CheckpointError, match="npz"):
            load(tmp_path / name)


def test_recording_needs_a_sequence_to_belong_to() -> None:
    _, seen = recorded()
    with pytest.raises(AssertionError):
        TraceRecorder(SHAPE, "")(seen[0][0])


def test_traces_do_not_load_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(moespac.trace.__path__, "moespac.trace.")]
    code = f"import sys, {', '.join(names)}, moespac.bench.coverage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
