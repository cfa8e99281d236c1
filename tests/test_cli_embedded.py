"""The command line over the real engine and the embedded pair."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import moespac
from moespac.cli import app
from tests.test_cli import JSON_KEYS

TARGET = Path(moespac.__file__).parent / "model" / "demo" / "target"
TEXT = "The captain looked at the sea. It was dark, and the wind had not changed since the morning. " * 4


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_generate_writes_the_same_text_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    result = run("generate", "--max-new-tokens", 24, "--host-memory", "25%", "--json", file)
    assert result.exit_code == 0, result.stderr
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == JSON_KEYS
    assert written["text"] == result.stdout != ""
    assert len(written["token_ids"]) == 24
    assert written["finish_reason"] == "length"
    assert written["policy"] == "moe-spac" and written["window"] == "auto"
    assert 0 < written["hit_rate"] < 1
    assert 0 <= written["acceptance_rate"] <= 1
    assert written["bytes_read"]["storage"] > 0
    assert set(written["versions"]) >= {"moespac", "torch", "transformers"}


@pytest.mark.parametrize(
    "flags", [["--lookup"], ["--no-draft"], ["--accelerator-memory", "10%"], ["--policy", "lru"]]
)
def test_flags_do_not_change_greedy_text(flags: list[str]) -> None:
    common = ["generate", "--no-profile", "--max-new-tokens", "16", "--host-memory", "30%"]
    assert run(*common, *flags).stdout == run(*common).stdout != ""


def test_demo_shows_identical_outputs() -> None:
    result = run("demo", "--max-new-tokens", "24")
    assert result.exit_code == 0, result.output
    assert "identical (24 tokens compared)" in result.stdout.replace("\n", " ")


def test_chat_answers() -> None:
    result = run("chat", "--max-new-tokens", "12", stdin="How many apples are three apples?\n/stats\n/exit\n")
    assert result.exit_code == 0, result.output
    assert "12 new" in result.stderr


def test_eval_agrees_with_transformers(text: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(TARGET).encode(TEXT)[:65]
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    ids = torch.tensor(tokens)
    with torch.no_grad():
        nats = [
            cross_entropy(model(ids[None, start : start + 32]).logits[0], ids[start + 1 : start + 33])
            for start in (0, 32)
        ]
    result = run("eval", "--text", text, "--max-tokens", 65, "--context", 32, "--host-memory", "25%")
    assert result.exit_code == 0, result.output
    assert f"{math.fsum(nats) / 2:.4f}" in result.stdout


def test_pack_then_eval_against_the_original(text: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert run("pack", TARGET, "-o", packed, "--format", "int8").exit_code == 0
    evaluate = ["eval", "--text", text, "--max-tokens", 129, "--context", 64]
    result = run(*evaluate, "--model", packed, "--against", TARGET)
    assert result.exit_code == 0, result.output
    ratio = float(result.stdout.split("model / original")[1].split()[3])
    assert ratio != 1.0 and ratio == pytest.approx(1.0, abs=0.02)


def test_inflate_then_generate_the_same_text(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    assert run("inflate", TARGET, "-o", wide, "--factor", 2).exit_code == 0
    common = ["generate", "--prompt", "The sea", "--max-new-tokens", 16, "--no-profile", "--model"]
    assert run(*common, wide).stdout == run(*common, TARGET).stdout != ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "does-not-exist"], "does-not-exist"),
        (["--draft", "does-not-exist"], "does-not-exist"),
        (["--host-memory", "much"], "--host-memory much"),
        (["--host-memory", "1B"], "--host-memory 1B"),
        (["--policy", "clairvoyant"], "clairvoyant"),
        (["--prompt", ""], "empty"),
    ],
)
def test_what_the_engine_refuses_is_one_line(flags: list[str], says: str) -> None:
    result = run("generate", *(flags if "--prompt" in flags else ["--prompt", "x", *flags]))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_real_process_is_quiet_and_ends_with_130_on_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moespac", "generate", "--no-profile", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(moespac.__file__).parent.parent)},
        cwd=tmp_path,
        # A test run in the background of a script ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
