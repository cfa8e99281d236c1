from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moespac.errors import CheckpointError
from moespac.trace.importer import category_of, import_trace, load
from moespac.types import ModelShape


def _published(tmp_path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {
        "experts": rng.integers(0, 9, (10, 2, 3)).astype(np.uint8),
        "probs": rng.random((10, 2, 3)).astype(np.float16),
        "offsets": np.array([0, 4, 10]),
        "tokens": rng.integers(0, 50, 10).astype(np.int32),
    }
    arrays["experts"][3, 1, 2] = 8
    arrays |= changes
    file = tmp_path / "published.npz"
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def test_each_token_is_a_pass(tmp_path: Path) -> None:
    file, meta = _published(tmp_path), tmp_path / "meta.jsonl"
    meta.write_text('{"dataset": "gpqa", "category": "physics"}\n{"category": "law"}\n')
    trace, raw = import_trace(file, meta), np.load(file)
    assert trace.shape == ModelShape(layers=2, experts=9, top_k=3, record_bytes=1)
    assert trace.categories == ("gpqa/physics", "law") and not trace.speculative
    assert trace.source == "imported from published.npz"
    passes = list(trace.passes(1))
    assert len(passes) == 6
    for at, seen in enumerate(passes, start=4):
        assert seen.window.tokens.tolist() == [raw["tokens"][at]]
        assert not (seen.window.drafted or seen.window.prefill or seen.accepted)
        np.testing.assert_array_equal(seen.routing[:, 0], raw["experts"][at])
        assert seen.weights is not None
        np.testing.assert_array_equal(seen.weights[:, 0], raw["probs"][at])
    np.testing.assert_array_equal(trace.decode_tokens(0).routing, raw["experts"][:4])


def test_load_takes_the_published_layout_as_it_is(tmp_path: Path) -> None:
    trace = load(_published(tmp_path, probs=None))
    assert trace.sequences == 2 and trace.weights is None and trace.categories == ("", "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": None}, "'tokens' is missing"),
        ({"tokens": np.zeros(9, np.int32)}, "cannot be imported"),
        ({"offsets": np.array([0, 4, 9])}, "cannot be imported"),
        ({"offsets": np.array(3)}, "cannot be imported"),
        ({"tokens": np.array(["a"] * 10)}, "cannot be imported"),
        ({"experts": np.zeros((10, 2, 3))}, "experts are not"),
        ({"experts": np.full((10, 2, 3), -1)}, "experts are not"),
        ({"experts": np.full((10, 2, 3), 2**17)}, "experts are not"),
        ({"experts": np.zeros((0, 2, 3), np.uint8)}, "experts are not"),
        ({"experts": np.full((10, 2), 3)}, "cannot be imported"),
        ({"probs": np.zeros((10, 2))}, "cannot be imported"),
    ],
)
def test_what_does_not_fit_is_one_error(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load(_published(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", ['{"category": "a"}\n', "[1]\n[2]\n", "{\n", None])
def test_a_meta_file_that_does_not_fit_is_one_error(meta: str | None, tmp_path: Path) -> None:
    file = tmp_path / "meta.jsonl"
    if meta is not None:
        file.write_text(meta)
    with pytest.raises(CheckpointError, match="meta"):
        import_trace(_published(tmp_path), file)


def test_categories_of_several_sources() -> None:
    lines = ({"benchmark": "mt_bench", "category": "writing"}, {"dataset": "gpqa"}, {"category": ""}, {})
    assert [category_of(json.loads(json.dumps(line))) for line in lines] == [
        "mt_bench/writing",
        "gpqa",
        "",
        "",
    ]
