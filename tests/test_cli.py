"""The command line over a fake engine: what flags mean, what goes where, what an error looks like."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner, Result

from moespac import errors
from moespac.cli import app
from moespac.cli.generate import DEMO_PROMPT
from moespac.cli.tables import size
from moespac.config import DeviceConfig, EngineConfig, MemoryConfig
from moespac.engine.summary import Summary

PIECES = ["Two ", "wörds\n"]
SUMMARY = Summary(
    text="".join(PIECES),
    token_ids=[7, 8, 9],
    finish_reason="length",
    prompt_tokens=4,
    passes=2,
    tokens_per_second=12.34,
    acceptance_rate=0.8125,
    mean_accepted=2.5,
    hit_rate=0.75,
    bytes_read={"storage": 1_500_000, "link": 0},
    peak_bytes={"host": 4_000_000_000, "accelerator": 0},
    seconds={"prefill": 1.0, "trunk": 2.0, "other": 1.0, "total": 4.0},
    policy="moe-spac",
    drafter="lookup",
    window=4,
    exactness="greedy tokens equal the model's own (float32)",
    versions={"moespac": "0"},
)
JSON_KEYS = {
    "text", "token_ids", "tokens_per_second", "acceptance_rate", "mean_accepted", "hit_rate", "bytes_read",
    "peak_bytes", "seconds", "policy", "exactness", "versions", "prompt_tokens", "finish_reason", "drafter",
    "window", "passes", "link_bandwidth", "page_locked", "shrinks", "host_us_per_layer", "launches_per_layer",
}  # fmt: skip


class FakeStream:
    def __init__(self, pieces: list[Any], tokens: list[int]) -> None:
        self.closed = False
        self.result = SimpleNamespace(summary=SUMMARY, token_ids=tokens)
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Stands in for ``moespac.load`` and the engine it returns; remembers what it was asked."""

    def __init__(self) -> None:
        self.loads: list[dict[str, Any]] = []
        self.streams: list[tuple[Any, dict[str, Any]]] = []
        self.chats: list[list[dict[str, str]]] = []
        self.answers: list[list[Any]] = []  # pieces of the next answers; then PIECES
        self.tokens: dict[str, list[int]] = {}  # by host memory, where it matters
        self.context = 64
        self.tokenizer = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()])
        self.open = False

    def load(self, model: Path | None = None, **settings: Any) -> FakeEngine:
        self.loads.append({"model": model, **settings})
        self.open = True
        return self

    def record_timeline(self, record: Any) -> None: ...

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def stream(self, prompt: Any, **settings: Any) -> FakeStream:
        self.streams.append((prompt, settings))
        pieces = self.answers.pop(0) if self.answers else PIECES
        if isinstance(pieces[0], errors.MoespacError):
            raise pieces[0]
        self.stream_made = FakeStream(pieces, self.tokens.get(self.loads[-1].get("host_memory", ""), [1, 2]))
        return self.stream_made

    def generate(self, prompt: Any, **settings: Any) -> None:
        """Nobody looks at the result."""

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        self.chats.append(messages)
        return [len(messages)]

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """Uniform over 16 tokens."""
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 16))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setitem(sys.modules, "moespac.engine.build", SimpleNamespace(load=fake.load))
    return fake


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def error_of(result: Result) -> str:
    """The one line that an error is."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# ---- generate: what is asked of the engine -----------------------------------------------------------


def test_defaults_are_those_of_the_configuration(engine: FakeEngine) -> None:
    run("generate")
    assert engine.loads == [
        {
            "model": None,
            "draft": "auto",
            "window": EngineConfig.window,
            "host_memory": MemoryConfig.host_memory,
            "accelerator_memory": MemoryConfig.accelerator_memory,
            "accelerator_context": DeviceConfig.context,
            "policy": EngineConfig.policy,
            "dtype": "auto",
            "profile": "auto",
        }
    ]
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "stop": []}
    assert engine.streams == [(DEMO_PROMPT, {"max_new_tokens": 128, **defaults})]


@pytest.mark.parametrize(
    ("flags", "loaded"),
    [
        (["--draft", "small"], {"draft": Path("small")}),
        (["--lookup"], {"draft": "lookup"}),
        (["--no-draft"], {"draft": "none"}),
        (["--window", "7"], {"window": 7}),
        (["--host-memory", "2GiB"], {"host_memory": "2GiB"}),
        (["--accelerator-memory", "17%"], {"accelerator_memory": "17%"}),
        (["--policy", "lru"], {"policy": "lru"}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--no-profile"], {"profile": None}),
        (["--profile"], {"profile": "auto"}),
        (["--model", "big"], {"model": Path("big")}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_flags_reach_load(engine: FakeEngine, command: str, flags: list[str], loaded: dict[str, Any]) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert run(command, *prompt, *flags).exit_code == 0
    assert loaded.items() <= engine.loads[0].items()


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
        (["--temperature", "0.5"], {"temperature": 0.5}),
        (["--top-k", "40"], {"top_k": 40}),
        (["--top-p", "0.9"], {"top_p": 0.9}),
        (["--min-p", "0.1"], {"min_p": 0.1}),
        (["--seed", "11"], {"seed": 11}),
        (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_flags_reach_stream(
    engine: FakeEngine, command: str, flags: list[str], asked: dict[str, Any]
) -> None:
    assert run(command, *flags, stdin="hello\n").exit_code == 0
    assert asked.items() <= engine.streams[0][1].items()


@pytest.mark.parametrize(
    "flags", [["--lookup", "--no-draft"], ["--draft", "d", "--lookup"], ["--draft", "d", "--no-draft"]]
)
def test_sources_of_drafts_exclude_each_other(engine: FakeEngine, flags: list[str]) -> None:
    assert "exclude each other" in error_of(run("generate", *flags))
    assert engine.loads == []


@pytest.mark.parametrize(
    "flags",
    [["--temperature", "nan"], ["--top-p", "2"], ["--min-p", "-1"], ["--top-k", "-1"], ["--seed", "-1"]],
)
def test_values_out_of_range_stop_before_anything_is_loaded(engine: FakeEngine, flags: list[str]) -> None:
    assert "cannot be used" in error_of(run("generate", *flags))
    assert engine.loads == []


@pytest.mark.parametrize(
    "flags",
    [["--max-new-tokens", "0"], ["--window", "-1"], ["--dtype", "int3"], ["--colour"], ["--seed", "x"]],
)
def test_usage_errors_exit_with_2(engine: FakeEngine, flags: list[str]) -> None:
    result = run("generate", *flags)
    assert result.exit_code == 2
    assert flags[0] in result.stderr
    assert engine.loads == []


# ---- generate: prompts -------------------------------------------------------------------------------


def test_prompt_comes_from_the_option_a_file_or_standard_input(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("naïve\r\n".encode())
    run("generate", "--prompt", "one")
    run("generate", "--prompt-file", file)
    run("generate", "--prompt-file", "-", stdin="three\n")
    run("generate", "--prompt", "")
    assert [prompt for prompt, _ in engine.streams] == ["one", "naïve\r\n", "three\n", ""]


def test_a_model_of_ones_own_needs_a_prompt(engine: FakeEngine) -> None:
    assert "give --prompt" in error_of(run("generate", "--model", "big"))
    assert engine.loads == []


def test_prompts_that_cannot_be_read_are_errors(engine: FakeEngine, tmp_path: Path) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes(b"na\xefve")
    assert "cannot be read" in error_of(run("generate", "--prompt-file", tmp_path / "none"))
    assert "cannot be read" in error_of(run("generate", "--prompt-file", tmp_path))
    assert "not UTF-8" in error_of(run("generate", "--prompt-file", latin))
    assert "not UTF-8" in error_of(run("generate", "--prompt-file", "-", stdin=b"\xff"))
    assert "exclude each other" in error_of(run("generate", "--prompt", "a", "--prompt-file", latin))
    assert engine.loads == []


# ---- generate: what comes out ------------------------------------------------------------------------


def test_stdout_is_the_text_and_stderr_the_summary(engine: FakeEngine) -> None:
    result = run("generate")
    assert result.stdout == "".join(PIECES)
    for shown in (
        "12.3 tokens/s", "81.2%", "2.50 tokens a pass", "75.0%", "storage 1.5 MB", "link 0 B", "host 4 GB",
        "4.00 s", "2.00 s (50%) trunk", "1.00 s (25%) prefill", SUMMARY.exactness,
    ):  # fmt: skip
        assert shown in result.stderr
    assert "\x1b" not in result.output
    assert not engine.open


def test_figures_that_do_not_apply_are_said_not_to(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acceptance_rate", "hit_rate", "tokens_per_second", "mean_accepted"):
        monkeypatch.setitem(SUMMARY.__dict__, name, None)
    result = run("generate")
    assert result.exit_code == 0
    assert result.stderr.count("n/a") == 4


def test_json_has_exactly_the_documented_keys(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    assert run("generate", "--json", file).exit_code == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == JSON_KEYS
    assert written == SUMMARY.to_dict()
    assert set(written["bytes_read"]) == {"storage", "link"}
    assert set(written["peak_bytes"]) == {"host", "accelerator"}
    assert list(tmp_path.iterdir()) == [file]


def test_json_through_a_link_keeps_the_link(engine: FakeEngine, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    run("generate", "--json", link)
    assert link.is_symlink() and json.loads((tmp_path / "target.json").read_text())


def test_json_that_cannot_be_written_is_found_before_loading(engine: FakeEngine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "none" / "run.json", tmp_path, tmp_path / "pipe", Path("/proc/run.json")):
        assert f"--json {place}" in error_of(run("generate", "--json", place))
    assert engine.loads == []


def test_json_keeps_what_was_there_when_generating_fails(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    engine.answers = [["Two", errors.StorageError("an expert could not be read")]]
    assert run("generate", "--json", file).exit_code == 2
    assert file.read_text() == "old"


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [errors.MoespacError, *errors.MoespacError.__subclasses__(), errors.DraftError]
)
def test_every_error_of_the_tree_is_one_line(engine: FakeEngine, kind: type[errors.MoespacError]) -> None:
    engine.answers = [[kind("the thing is wrong; mend it")]]
    assert error_of(run("generate")) == "error: the thing is wrong; mend it\n"
    assert not engine.open


def test_ctrl_c_exits_with_130(engine: FakeEngine) -> None:
    engine.answers = [["Two ", KeyboardInterrupt()]]
    result = run("generate")
    assert result.exit_code == 130
    assert result.stdout == "Two "
    assert not engine.open


def test_defects_keep_their_traceback(engine: FakeEngine) -> None:
    engine.answers = [["Two ", ZeroDivisionError("a defect")]]
    assert isinstance(run("generate").exception, ZeroDivisionError)


# ---- chat --------------------------------------------------------------------------------------------


def test_chat_keeps_the_history(engine: FakeEngine) -> None:
    result = run("chat", stdin="hello\n\n  \nand then?\n")
    assert result.exit_code == 0
    answer = {"role": "assistant", "content": "Two wörds"}
    hello = {"role": "user", "content": "hello"}
    assert engine.chats == [[hello], [hello, answer, {"role": "user", "content": "and then?"}]]
    assert [prompt for prompt, _ in engine.streams] == [[1], [3]]


def test_chat_joins_lines_at_a_trailing_backslash(engine: FakeEngine) -> None:
    run("chat", stdin="one\\\ntwo\\\nthree\nfour\n")
    assert [chat[-1]["content"] for chat in engine.chats] == ["one\ntwo\nthree", "four"]


def test_chat_ctrl_c_stops_the_answer_and_keeps_what_there_is(engine: FakeEngine) -> None:
    engine.answers = [["Half ", KeyboardInterrupt()]]
    run("chat", stdin="hello\n")
    assert engine.stream_made.closed
    engine.answers = [["Half ", KeyboardInterrupt()]]
    result = run("chat", stdin="hello\nmore\n")
    assert result.exit_code == 0
    assert engine.chats[2][1] == {"role": "assistant", "content": "Half"}


def test_chat_ctrl_c_at_the_prompt_leaves(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("chat").exit_code == 0
    assert not engine.open


def test_chat_reset_forgets(engine: FakeEngine) -> None:
    run("chat", stdin="hello\n/reset\nagain\n")
    assert [len(chat) for chat in engine.chats] == [1, 1]


def test_chat_exit_leaves_at_once(engine: FakeEngine) -> None:
    assert run("chat", stdin="/exit\nhello\n").exit_code == 0
    assert engine.chats == []


def test_chat_says_the_system_message_before_everything(engine: FakeEngine) -> None:
    run("chat", "--system", "Be brief.", stdin="hello\n/system Rhyme.\nagain\n/system off\nthird\n/system\n")
    first = [chat[0]["content"] for chat in engine.chats]
    assert first == ["Be brief.", "Rhyme.", "hello"]
    assert [chat[0]["role"] for chat in engine.chats] == ["system", "system", "user"]


def test_chat_help_stats_and_unknown_commands(engine: FakeEngine) -> None:
    before, after = run("chat", stdin="/stats\n"), run("chat", stdin="hello\n/stats\n/help\n/dance now\n")
    assert "nothing was answered" in before.stderr
    for shown in ("81.2%", "/save FILE", "there is no /dance"):
        assert shown in after.stderr and shown not in before.stderr
    assert len(engine.chats) == 1


def test_chat_save_writes_the_conversation(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "my chat.json"
    run("chat", stdin=f"hello\n/save {file}\n")
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]


@pytest.mark.parametrize("command", ["/save", "/save /proc/none/chat.json"])
def test_chat_goes_on_when_it_cannot_save(engine: FakeEngine, command: str) -> None:
    assert run("chat", stdin=f"{command}\nhello\n").exit_code == 0
    assert len(engine.chats) == 1


def test_chat_goes_on_after_an_error_without_the_question(engine: FakeEngine) -> None:
    engine.answers = [[errors.ConfigError("too long; shorten it")]]
    result = run("chat", stdin="hello\nshorter\n")
    assert result.exit_code == 0
    assert "error: too long; shorten it" in result.stderr
    assert engine.chats[1] == [{"role": "user", "content": "shorter"}]


# ---- demo --------------------------------------------------------------------------------------------


def test_demo_compares_two_budgets(engine: FakeEngine) -> None:
    result = run("demo", "--max-new-tokens", "5")
    assert result.exit_code == 0
    _, *measured = engine.loads  # the first only warms up
    assert [load["host_memory"] for load in measured] == ["100%", "25%"]
    assert all(load["accelerator_memory"] == "none" and load["profile"] is None for load in measured)
    assert result.stdout.count("".join(PIECES)) == 2
    for shown in ("identical", "tokens/s", "hit rate", "12.3", "75.0%", "1.5 MB", "4 GB"):
        assert shown in result.stdout


def test_demo_fails_when_the_outputs_differ(engine: FakeEngine) -> None:
    engine.tokens = {"100%": [1, 2, 3], "25%": [1, 2, 4]}
    result = run("demo")
    assert result.exit_code == 1
    assert "differ" in result.stdout and "identical" not in result.stdout


# ---- eval, pack, inflate, bench ----------------------------------------------------------------------


def test_eval_shows_model_and_original_side_by_side(engine: FakeEngine, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("a bb ccc " * 20)
    result = run(
        "eval", "--model", "packed", "--against", "whole", "--text", text, "--max-tokens", 33, "--context", 8
    )
    assert result.exit_code == 0, result.output
    assert [load["model"] for load in engine.loads] == [Path("packed"), Path("whole")]
    assert all(load["draft"] == "none" and load["profile"] is None for load in engine.loads)
    for shown in ("packed", "whole", "2.7726", "16.000", "32", "+0.0000", "1.0000"):
        assert shown in result.stdout


def test_eval_refuses_what_it_cannot_compare(engine: FakeEngine, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("a bb ccc")
    assert "takes 64 tokens" in error_of(run("eval", "--text", text, "--context", 65))
    assert "cannot be read" in error_of(run("eval", "--text", tmp_path / "none"))
    (tmp_path / "short.txt").write_text("a")
    assert "nothing to predict" in run("eval", "--text", tmp_path / "short.txt", "--context", 8).stderr
    encodings = iter(([1, 2, 3], [1, 2, 4]))
    engine.tokenizer = SimpleNamespace(encode=lambda text: next(encodings))
    different = run("eval", "--model", "a", "--against", "b", "--text", text, "--context", 8)
    assert different.exit_code == 2 and "another tokenizer" in different.stderr
    engine.tokenizer = None
    assert "no tokenizer" in error_of(run("eval", "--text", text, "--context", 8))


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_pack_passes_on_what_it_was_told(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("moespac.experts.pack.pack", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("moespac.experts.pack.print_report", lambda report: None)
    assert run("pack", "in", "-o", "out", "--format", format).exit_code == 0
    assert calls == [(Path("in"), Path("out"), format)]


def test_inflate_passes_on_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("moespac.model.inflate.inflate", lambda *arguments: calls.append(arguments))
    assert run("inflate", "in", "-o", "out", "--factor", "4").exit_code == 0
    assert calls == [(Path("in"), Path("out"), 4)]


def test_bench_decisions_prints_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moespac.bench.decisions.table", lambda: print("the table"))
    assert "the table" in run("bench", "decisions").stdout


# ---- help and global options -------------------------------------------------------------------------


def test_help_lists_all_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("generate", "chat", "demo", "pack", "inflate", "eval", "bench"):
        assert f" {command} " in result.stdout


def test_every_option_has_help() -> None:
    def commands(group: Any) -> Iterator[Any]:
        yield group
        for command in getattr(group, "commands", {}).values():
            yield from commands(command)

    for command in commands(get_command(app)):
        assert command.help, command.name
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.name)


def test_version() -> None:
    assert run("--version").stdout.startswith("moespac 0.")


def test_log_level_is_that_of_the_packages_logger(engine: FakeEngine) -> None:
    for level in ("debug", "warning"):
        run("--log-level", level, "generate")
        assert logging.getLogger("moespac").level == getattr(logging, level.upper())
    assert run("--log-level", "loud", "generate").exit_code == 2


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (58 * 10**9, "58 GB")],
)  # fmt: skip
def test_sizes_have_three_digits(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown
