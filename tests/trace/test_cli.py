"""``moespac trace`` from end to end, on the embedded model and on small files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moespac.cli import app
from moespac.trace import Trace, load, read, write
from tests.trace.small import decoded, recorded


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line of an error with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    return result.stderr


def random_text(seed: int, experts: int = 8, length: int = 40) -> Trace:
    rng = np.random.default_rng(seed)
    return decoded([[rng.permutation(experts)[:2].tolist() for _ in range(length)]], experts, layers=2)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write(tmp_path / "trace.npz", random_text(1))
    return tmp_path / "trace.npz"


def test_what_the_embedded_model_routes_is_recorded(tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "trace.npz"
    lines = [
        {"prompt": "The sea was", "category": "prose"},
        {"turns": ["Who are you?", "And now?"], "benchmark": "mt_bench", "category": "chat"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    result = run("record", "--prompts", prompts, "-o", file, "--max-new-tokens", 12, "--no-profile")
    assert result.exit_code == 0, result.output
    trace = read(file)
    assert trace.categories == ("prose", "mt_bench/chat")
    assert re.fullmatch(r"moespac \S+: the embedded model, .*, K = \S+", trace.source)
    assert trace.speculative and trace.weights is not None
    for sequence in range(2):
        passes = list(trace.passes(sequence))
        assert passes[0].window.prefill and not any(seen.window.prefill for seen in passes[1:])
        for seen in passes:
            assert seen.routing.min() >= 0 and seen.weights is not None and (seen.weights > 0).all()
        # the prefill yields the first of 12 tokens, the last one is never fed
        decoded_tokens = trace.decode_tokens(sequence).tokens
        assert 10 <= len(decoded_tokens) <= 12
    chat, prose = (next(iter(trace.passes(n))).window.tokens for n in (1, 0))
    assert len(chat) > len(prose) > 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ('{"turns": []}', "line 1"),
        ('{"prompt": 3}', "line 1"),
        ('{"prompt": ""}', "line 1"),
        ("[]", "line 1"),
        ("{", "line 1"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_before_anything_runs(
    content: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    assert reason in refused("record", "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "t.npz")


def test_recording_says_what_it_needs(tmp_path: Path) -> None:
    assert "--prompt TEXT or --prompts" in refused("record", "-o", tmp_path / "t.npz")
    assert "cannot be written" in refused("record", "--prompt", "a", "-o", tmp_path / "no" / "t.npz")


def test_a_published_trace_is_imported(tmp_path: Path) -> None:
    source, file = tmp_path / "source.npz", tmp_path / "trace.npz"
    experts = random_text(1).routing
    np.savez(source, experts=experts, tokens=np.arange(40), offsets=np.array([0, 40]))
    (tmp_path / "meta.jsonl").write_text('{"dataset": "gpqa"}')
    assert run("import", source, "-o", file, "--meta", tmp_path / "meta.jsonl").exit_code == 0
    np.testing.assert_array_equal(read(file).routing, experts)
    assert read(file).categories == ("gpqa",)
    assert run("coverage", source).stdout == run("coverage", file).stdout


def test_a_trace_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "t.npz", recorded()[0])
    result = run("show", tmp_path / "t.npz", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    for words in (
        "3 MoE layers, 8 experts each, top 2",
        "poetry (1), code (1)",
        "10 drafted, 60.0% accepted",
    ):
        assert words in result.stdout
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4


def test_a_trace_without_decoding_shows_nothing(tmp_path: Path) -> None:
    write(tmp_path / "t.npz", decoded([[[0, 1]]]))
    loaded = load(tmp_path / "t.npz")
    loaded.prefill[:] = True
    write(tmp_path / "t.npz", loaded)
    assert "no decoded tokens" in refused("show", tmp_path / "t.npz")


def test_plots_without_matplotlib_say_how_to_install_it(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("show", trace, "--plots", tmp_path)
    assert result.exit_code == 2 and "pip install 'moespac[plots]'" in result.stderr


def test_coverage_is_printed_and_written(trace: Path, tmp_path: Path) -> None:
    write(tmp_path / "other.npz", random_text(2))
    file = tmp_path / "coverage.json"
    cold = run("coverage", trace, "--slots", "50%", "--window", 4, "--json", file)
    assert cold.exit_code == 0, cold.output
    found = json.loads(file.read_text())
    names = ["moe-spac", "reference", "moving-average", "known-next-window"]
    assert [record["estimator"] for record in found] == names
    for record in found:
        assert set(record) == {"estimator", "coverage_tokens", "coverage_experts"}
        assert 0 < record["coverage_tokens"] <= found[-1]["coverage_tokens"] <= 1
        assert f"{record['coverage_tokens']:.1%}" in cold.stdout
    warmed = run(
        "coverage", trace, "--slots", "50%", "--window", 4, "--warm", tmp_path / "other.npz", "--warm", trace
    )
    assert warmed.exit_code == 0 and warmed.stdout != cold.stdout


@pytest.mark.parametrize("slots", ["0%", "0.0%", "100.1%", "200%", "-5%", "25", "abc", "", "nan%", "1e1%"])
def test_a_share_that_is_none_is_refused(slots: str, trace: Path) -> None:
    assert "--slots" in refused("coverage", trace, f"--slots={slots}")


def test_traces_that_do_not_fit_are_refused(trace: Path, tmp_path: Path) -> None:
    other, cut = tmp_path / "other.npz", tmp_path / "cut.npz"
    write(other, random_text(1, experts=9))
    cut.write_bytes(trace.read_bytes()[:-50])
    assert "2 layers of 9 experts, top 2" in refused("coverage", trace, "--warm", other)
    assert "cut.npz" in refused("coverage", trace, "--warm", cut)
    assert "cut.npz" in refused("coverage", cut)
    assert "cut.npz" in refused("show", cut)
    assert "no sequence of 41 decoded tokens" in refused("coverage", trace, "--window", 41)
    assert "holds none" in refused("coverage", trace, "--slots", "1%")
    assert "cannot be written" in refused("coverage", trace, "--json", tmp_path / "no" / "f.json")
