"""The documentation is true: the command reference is current, links lead somewhere, examples run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

import moespac
from moespac.cli import app
from moespac.policy.registry import ENGINE_POLICIES, SIMULATOR_POLICIES
from moespac.sim.hardware import find_profile
from moespac.sim.shapes import find_model
from moespac.sim.simulator import Setting, simulate
from moespac.sim.synthetic import synthetic_routing
from moespac.types import Capacity


def pages(repository: Path) -> list[Path]:
    return sorted((repository / "docs").glob("*.md"))


def test_the_command_reference_is_current(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("commands", repository / "scripts" / "commands.py")
    assert spec is not None and spec.loader is not None
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    assert commands.FILE.read_text() == commands.render(), "run python scripts/commands.py"


def test_links_lead_somewhere(repository: Path) -> None:
    count = 0
    for page in pages(repository):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
                count += 1
    assert count > 10
    index = (repository / "docs" / "index.md").read_text()
    assert all(page.name in index for page in pages(repository) if page.name != "index.md")


def test_commands_in_the_pages_exist(repository: Path) -> None:
    """`serve` comes with a package of its own; where that is not there, its examples are not checked."""
    commands = get_command(app).commands
    count = 0
    for page in pages(repository):
        if page.name in ("commands.md", "log.md"):
            continue
        text = re.sub(
            r"\n(?!\n)",
            " ",
            re.sub(r"```.*?```", lambda m: m[0].replace("\n", "\n\n"), page.read_text(), flags=re.S),
        )
        for call in re.findall(r"(?:^|`|bin/)moespac ([a-z][^`\n#;]*)", text, re.M):
            name, *words = call.split()
            if name == "serve" and name not in commands:
                continue
            command = commands[name]
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            options = {
                option
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert {word for word in words if word.startswith("--")} <= options | {"--help"}, (
                page.name,
                call,
            )
            count += 1
    assert count > 15


@pytest.fixture
def fading(repository: Path):
    """The policy of docs/adding-a-policy.md, as its reader would have it."""
    text = (repository / "docs" / "adding-a-policy.md").read_text()
    policy, use = re.findall(r"```python\n(.*?)```", text, re.S)
    body = policy[policy.index("class ") : policy.index("ENGINE_POLICIES[")]
    assert len(body.strip().splitlines()) <= 30
    exec(policy, {})
    yield use
    del ENGINE_POLICIES["fading"], SIMULATOR_POLICIES["fading"]


def test_the_policy_of_the_pages_runs_in_the_engine(fading: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(fading, names)
    assert 0.3 < float(capsys.readouterr().out.split()[0]) <= 1
    with moespac.load(profile=None) as engine:
        assert engine.generate("The sea", max_new_tokens=16).token_ids == names["summary"].token_ids
    with moespac.load(policy="fading", host_memory="50%", accelerator_memory="10%", profile=None) as engine:
        assert engine.generate("The sea", max_new_tokens=16).token_ids == names["summary"].token_ids


def test_the_policy_of_the_pages_runs_in_the_simulator(fading: str) -> None:
    from dataclasses import replace

    model = replace(find_model("gpt-oss-20b-mxfp4"), layers=2)
    trace = synthetic_routing(model.to_model_shape(), [80]).to_trace(model.experts, "synthetic")
    setting = Setting(find_profile("laptop-cpu-nvme"), model, Capacity(32), window=0)
    result = simulate(trace, "fading", setting)
    assert result.hit_rate > 0.5 and np.isfinite(result.tokens_per_second)
    assert result.hit_rate > simulate(trace, "accelerate", setting).hit_rate
