"""The project around the engine: what a fresh clone, a wheel and an import promise."""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moespac
from moespac import errors

DEMO = Path(moespac.__file__).parent / "model" / "demo"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


def test_readme_shows_the_two_commands_and_make_has_them(repository: Path) -> None:
    readme, makefile = (repository / "README.md").read_text(), (repository / "Makefile").read_text()
    for command in ("demo", "test"):
        assert re.search(rf"^make {command}\b", readme, re.M)
        assert re.search(rf"^{command}:", makefile, re.M)


def test_readme_and_makefile_use_only_commands_and_options_that_exist(repository: Path) -> None:
    from typer.main import get_command

    from moespac.cli import app

    commands = get_command(app).commands
    text = (repository / "README.md").read_text() + (repository / "Makefile").read_text()
    calls = re.findall(r"^(?:\t\$\(PYTHON_IN_VENV\) -m )?moespac ([a-z].*)", text, re.M)
    assert len(calls) >= 6
    for name, *words in (call.split("#")[0].split() for call in calls):
        command = commands[name]
        while hasattr(command, "commands"):  # a group: its subcommand comes next
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_readme_file_tree_is_true(repository: Path) -> None:
    tree = re.search(r"^moespac/\n(.*?)^tests/", (repository / "README.md").read_text(), re.M | re.S)
    assert tree is not None
    for name in re.findall(r"^  (\S+)", tree[1], re.M):
        assert (repository / "moespac" / name).exists(), name


def test_version_is_one(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "moespac/__init__.py"
    assert importlib.metadata.version("moespac") == moespac.__version__


def test_changelog_has_an_unreleased_section(repository: Path) -> None:
    assert re.search(r"^## \[Unreleased\]", (repository / "CHANGELOG.md").read_text(), re.M)


def test_licence_is_apache_2(repository: Path) -> None:
    licence = (repository / "LICENSE").read_text()
    assert licence.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("model", ["target", "draft"])
def test_embedded_models_are_whole(model: str) -> None:
    for name in FILES:
        assert (DEMO / model / name).stat().st_size > 0
    assert (DEMO / "README.md").exists()


def test_embedded_pair_shares_its_tokenizer() -> None:
    assert (DEMO / "target/tokenizer.json").read_bytes() == (DEMO / "draft/tokenizer.json").read_bytes()


def test_wheel_takes_the_whole_package_and_nothing_embedded_is_ignored_by_git(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["moespac"]}
    if (repository / ".git").exists():  # hatch leaves out what git ignores
        files = [str(file) for file in DEMO.rglob("*") if file.is_file()]
        ignored = subprocess.run(
            ["git", "check-ignore", "--stdin"], input="\n".join(files), cwd=repository, text=True
        )
        assert ignored.returncode == 1


def test_setup_pins_torch_and_ci_runs_make_test(repository: Path) -> None:
    assert re.search(r"^torch==", (repository / "constraints.txt").read_text(), re.M)
    assert "--constraint constraints.txt" in (repository / "Makefile").read_text()
    script = repository / ".ci" / "run"
    assert os.stat(script).st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()


def test_import_loads_neither_torch_nor_transformers(repository: Path) -> None:
    code = "import moespac, moespac.cli, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run_python(code, repository).strip() == "set()"


def test_public_names_resolve() -> None:
    for name in moespac.__all__:
        assert getattr(moespac, name) is not None
    assert set(dir(moespac)) == set(moespac.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        moespac.lod  # noqa: B018


def test_public_errors_are_the_exception_tree() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.MoespacError)
    }
    assert tree == {name for name in moespac.__all__ if name.endswith("Error")}
