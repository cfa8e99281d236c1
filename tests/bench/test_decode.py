"""``moespac bench decode`` in miniature, with our own contenders, and everything that can go wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moespac.bench.decode import contenders, limits, runs
from moespac.bench.decode.contenders import DEFAULT, parse_contenders
from moespac.bench.decode.files import ModelFiles, make_files
from moespac.bench.decode.limits import Limits
from moespac.bench.decode.prompts import BUILT_IN, WARMUP, tokenize
from moespac.bench.decode.records import FAILED, MISSING, OK, TIMEOUT, Record, read_records
from moespac.bench.decode.runs import Plan, room_for, run_all
from moespac.bench.decode.usage import Memory, memory_of, read_from_disk
from moespac.cli import app
from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError
from tests.bench.small_decode import record

CONFIG = DecodeBenchConfig(warmup_tokens=2, memory_bytes=1 << 20, storage_seconds=0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_files(tmp_path_factory.mktemp("work"), factor=1, format="f32", gguf=False)


@pytest.fixture
def plan(files: ModelFiles) -> Plan:
    return Plan(
        files,
        parse_contenders("moe-spac"),
        budgets=(1.0,),
        rounds=1,
        prompts=tokenize(BUILT_IN[:2], files.checkpoint),
        warmup=tokenize([WARMUP], files.checkpoint)[0],
        tokens=4,
        threads=1,
        format="f32",
        config=CONFIG,
    )


def run(plan: Plan, before: list[Record] | None = None) -> list[Record]:
    kept: list[Record] = []
    run_all(plan, before or [], kept.append, lambda done, of: None)
    return kept


def test_every_contender_decodes_the_same_tokens_in_its_own_process(plan: Plan) -> None:
    plan = replace(plan, contenders=parse_contenders("moe-spac,lru+draft"), rounds=1)
    plain, drafted = run(plan, [record("moe-spac", 1.0, budget=1.0)])
    assert (plain.status, plain.contender, plain.round) == (OK, "moe-spac", 1)  # the file had its round 0
    assert (drafted.status, drafted.contender, drafted.round) == (OK, "lru+draft", 0)
    assert plain.tokens == drafted.tokens == 2 * 4
    assert [text.token_ids for text in plain.texts] == [text.token_ids for text in drafted.texts]
    assert plain.tokens_per_pass == 1 and plain.acceptance is None
    assert drafted.tokens_per_pass > 1 and 0 < drafted.acceptance <= 1
    assert plain.limits == drafted.limits and plain.limits.storage > 0 < plain.limits.memory
    for each in (plain, drafted):
        assert each.rate > 0 and each.first_seconds > 0 and each.load_seconds > 0
        assert each.bound is not None and each.rate < each.bound
        assert each.needs is not None and each.needs.misses == 0 and each.needs.slots == 256
        assert sum(each.causes.values()) == pytest.approx(1 / each.rate, rel=0.05)
        assert each.memory["experts"] > 0 and each.memory["own"] > each.memory["libraries"] > 0
    assert plain.needs is not None and plain.needs.active == 8 * 8 * 4  # tokens x layers x top-k


def test_a_budget_is_a_share_of_the_slots_and_misses_are_read(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock: what others do on this machine is not this test's to limit."""
    monkeypatch.setattr(runs, "Ballast", _NoBallast)
    found = run(replace(plan, budgets=(0.25,), contenders=parse_contenders("moe-spac")))[0]
    assert found.status == OK and found.needs is not None
    assert found.needs.slots == 64 and 0 < found.needs.misses < found.needs.active
    assert found.hit_rate is not None and found.hit_rate < 1
    assert found.memory["left"] == _NoBallast.asked[-1]
    assert found.memory["experts"] <= 64 * found.record_bytes
    assert _NoBallast.asked[0] == CONFIG.loading_bytes  # loading is not limited


class _NoBallast:
    asked: list[int] = []  # noqa: RUF012
    holds = True

    def leave(self, nbytes: int) -> int:
        self.asked.append(nbytes)
        return nbytes

    def __enter__(self) -> _NoBallast:
        return self

    def __exit__(self, *what: object) -> None:
        pass


def test_room_for_experts_is_what_the_budget_says(plan: Plan) -> None:
    task = replace(plan.task(plan.contenders[0], 0.25), expert_bytes=4000)
    ready = {"own": 77, "model": 88, "libraries": 500, "experts": 300, "buffers": 20}
    assert room_for(task, ready) == 1000 - 300 + 20 + CONFIG.margin_bytes


def test_a_contender_that_fails_is_a_record_with_its_reason(plan: Plan) -> None:
    broken = replace(plan, files=_Broken(**vars(plan.files)), contenders=parse_contenders("moe-spac"))
    found = run(broken)
    assert [each.status for each in found] == [FAILED]
    assert "nowhere" in found[0].reason and "\n" not in found[0].reason and found[0].texts == ()


class _Broken(ModelFiles):
    """A pack that is gone by the time a worker looks; the parent still knows its shape."""

    def __init__(self, **fields: Path) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "_whole", ModelFiles(**fields))
        object.__setattr__(self, "pack", Path("/nowhere"))

    shape = property(lambda self: self._whole.shape)
    records = property(lambda self: self._whole.records)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "did not fit the memory"),
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("raise ValueError('so it is')", "ended with code 1: ValueError: so it is"),
        ("print('{}')", "no message"),
    ],
)
def test_how_a_worker_ended_is_said(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, reason: str
) -> None:
    _stand_in(monkeypatch, tmp_path, code)
    found = run(plan)[0]
    assert found.status == FAILED and reason in found.reason


def test_a_worker_that_takes_too_long_is_ended(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _stand_in(monkeypatch, tmp_path, "import time; time.sleep(60)")
    found = run(replace(plan, config=replace(CONFIG, run_seconds=0.5)))[0]
    assert (found.status, found.reason) == (TIMEOUT, "took longer than 0 s")


def _stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """``code`` runs where the worker would."""
    file = folder / "python"
    file.write_text(f"#!{os.sys.executable}\n{code}\n")  # type: ignore[attr-defined]
    file.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(file))


def test_a_peer_that_is_not_installed_is_one_record(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "find_spec", lambda module: None)
    found = run(replace(plan, contenders=parse_contenders("llama.cpp+draft")))[0]
    assert found.status == MISSING
    assert found.reason == "not installed: llama-cpp-python, gguf (pip install 'moespac[bench]')"


def test_what_was_measured_before_an_interrupt_is_kept(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moespac.cli.bench_decode import _run

    def stop(plan: Plan, before: object, keep, progress: object) -> None:
        keep(record("moe-spac", 1.0, setting=plan.setting))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_all", stop)
    _run(plan, tmp_path / "records")
    assert [each.contender for each in read_records(tmp_path / "records", "--json")] == ["moe-spac"]
    with pytest.raises(ConfigError, match="another setting \\(tokens: 4, not 5\\)"):
        _run(replace(plan, tokens=5), tmp_path / "records")


def test_tasks_survive_the_way_to_the_worker(plan: Plan) -> None:
    task = plan.task(plan.contenders[0], 0.5)
    assert type(task).from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_rounds_take_turns_and_the_limit_only_tightens(plan: Plan) -> None:
    plan = replace(
        plan, budgets=(0.25, 1.0), rounds=2, contenders=parse_contenders("lru,transformers,transformers+disk")
    )
    turns = [(budget, [each.name for each in taking]) for budget, taking in plan.turns()]
    assert turns == [(1.0, ["lru", "transformers"])] * 2 + [(0.25, ["lru", "transformers+disk"])] * 2


def test_names_say_who_runs() -> None:
    assert [each.name for each in parse_contenders(",".join(DEFAULT))] == list(DEFAULT)
    drafted = parse_contenders(" llama.cpp+draft ,sp-moe,sp-moe")
    assert [(each.system, each.draft) for each in drafted] == [("llama.cpp", "draft"), ("sp-moe", "none")]
    (fixed,) = parse_contenders("moe-spac+draft@2")
    assert (fixed.system, fixed.draft, fixed.window) == ("moe-spac", "draft", 2)
    unknown = ("nobody", "lru+nothing", "transformers+draft", "llama.cpp+sd", ",")
    for bad in (*unknown, "moe-spac@2", "moe-spac+draft@many", "llama.cpp+draft@2"):
        with pytest.raises(ConfigError, match="--contenders"):
            parse_contenders(bad)


def test_memory_is_told_apart_by_what_it_holds(tmp_path: Path) -> None:
    model = tmp_path / "model"
    mappings = [
        ("00000000-00001000 rw-p 00000000 00:00 0", 100),
        ("00001000-00002000 rw-p 00000000 00:00 0 [heap]", 10),
        ("00002000-00003000 rw-s 00000000 00:01 4 /dev/zero (deleted)", 1),
        (f"00003000-00004000 r--s 00000000 fe:00 5 {model}/target.gguf", 1000),
        ("00004000-00005000 r-xp 00000000 fe:00 6 /usr/lib/libc.so", 5000),
        (f"00005000-00006000 r-xp 00000000 fe:00 7 {model}-other/file", 200),
    ]
    smaps = "".join(f"{head}\nSize: 4 kB\nRss:     {size} kB\nPss: 1 kB\n" for head, size in mappings)
    assert memory_of(smaps, model) == Memory(own=111 << 10, model=1000 << 10, libraries=5200 << 10)


def test_reads_are_counted() -> None:
    assert read_from_disk() >= 0


def test_limits_are_measured_on_the_packs_own_records(files: ModelFiles) -> None:
    found = limits.measure_limits(files, 1, CONFIG)
    assert isinstance(found, Limits) and 1e6 < found.storage < 1e12 and 1e8 < found.memory < 1e13


# ---- the command -------------------------------------------------------------------------------------


def invoke(*flags: str):
    return CliRunner().invoke(app, ["bench", "decode", *flags], env={"COLUMNS": "200"})


def test_the_command_runs_reports_and_reports_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("storage_seconds", "memory_bytes"):
        monkeypatch.setattr(DecodeBenchConfig, name, getattr(CONFIG, name))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"id": "1", "benchmark": "own", "turns": ["Why is the sky blue?"]}\n{"prompt": "The sea"}\n'
    )
    report, kept = tmp_path / "report.md", tmp_path / "kept"
    flags = ["--work", str(tmp_path / "work"), "--factor", "2", "--format", "int8", "--budgets", "100"]
    flags += ["--contenders", "moe-spac", "--rounds", "1", "--tokens", "3", "--prompts", str(prompts)]
    first = invoke(*flags, "--json", str(kept), "--report", str(report), "--threads", "1")
    assert first.exit_code == 0, first.output
    assert "bench" not in first.stderr and "━" not in first.stderr  # no bar where there is no terminal
    again = invoke("--from", str(kept))
    assert again.exit_code == 0 and again.stdout == report.read_text()
    assert "256 experts in int8" in again.stdout and "2 prompts, 3 tokens" in again.stdout
    assert "| moe-spac |" in again.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--budgets", "0"], "--budgets 0%"),
        (["--budgets", "many"], "--budgets many%"),
        (["--budgets", ","], "--budgets: names no share"),
        (["--contenders", "nobody"], "--contenders nobody: is not known"),
        (["--prompts", "/nowhere/prompts"], "--prompts /nowhere/prompts: cannot be read"),
        (["--from", "/nowhere/records"], "--from /nowhere/records: cannot be read"),
        (["--report", "/nowhere/report"], "--report /nowhere/report"),
        (["--work", "/dev/null/work", "--contenders", "lru"], "--work /dev/null/work: cannot be used"),
        (["--format", "int3"], "int3"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], said: str) -> None:
    result = invoke(*flags)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and said in result.stderr, result.stderr


def test_an_empty_file_of_records_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "records").touch()
    result = invoke("--from", str(tmp_path / "records"))
    assert result.exit_code == 2 and "holds no records" in result.stderr
