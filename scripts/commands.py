"""The command reference, docs/commands.md, from the commands' own help. ``--check``: exit code 1 if it is stale.

python scripts/commands.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from moespac.cli import app

FILE = Path(__file__).parent.parent / "docs" / "commands.md"
_NAMES = {Path: "PATH", str: "TEXT", int: "NUMBER", float: "NUMBER"}
_HEAD = """\
# Commands

Written by `python scripts/commands.py` from what `moespac COMMAND --help` says; a test compares the two.

Errors that you can act on are one line on stderr and exit code 2. Amounts of memory are bytes with a unit ("2GiB",
"500MB") or a share of all experts ("25%"). `--log-level debug|info|warning|error` comes before the command; colours
go away with `NO_COLOR=1`, bars and spinners where stderr is no terminal.
"""


def render() -> str:
    """The whole file."""
    commands = list(_commands("moespac", get_command(app)))
    contents = [
        f"- [`{name}`](#{name.replace(' ', '-')}): {_first_sentence(command)}" for name, command in commands
    ]
    return "\n".join([_HEAD, *contents, "", *(_section(name, command) for name, command in commands)])


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """All that do something, groups left out."""
    if hasattr(command, "commands"):
        for child in command.commands.values():
            yield from _commands(f"{name} {child.name}", child)
    else:
        yield name, command


def _section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(
        [name, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])]
    )
    text = "\n".join(line.strip() for line in (command.help or "").splitlines())
    lines = [f"## {name}", "", "```", usage, "```", "", text.strip(), ""]
    if arguments or options:
        lines += ["| | | default |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in (*arguments, *options)]
        lines += [""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{_metavar(parameter)}`"
    else:
        kind = "" if parameter.is_flag else f" {_metavar(parameter)}"
        names = " / ".join([*parameter.opts, *parameter.secondary_opts])
        name = f"`{names}{kind}`"
    help_text = (parameter.help or "").replace("|", "\\|")
    return f"| {name.replace('|', chr(92) + '|')} | {help_text} | {_default(parameter)} |"


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return parameter.metavar
    if hasattr(parameter, "type_descriptor"):  # Typer since 0.27
        annotation = parameter.type_descriptor.annotation
        choices = get_args(annotation)  # of a Literal; or the type of what may be given several times
        if choices and not isinstance(choices[0], type):
            return "|".join(map(str, choices))
        return _NAMES[choices[0] if choices else annotation]
    choices = getattr(parameter.type, "choices", None)
    return "|".join(map(str, choices)) if choices else parameter.type.name.upper()


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default is False or default in ("", [], ()) or parameter.show_default is False:
        return ""
    if parameter.is_flag:
        return f"`{parameter.opts[0]}`"
    return f"`{parameter.default}`"


def _first_sentence(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        stale = not FILE.exists() or FILE.read_text() != text
        if stale:
            print(
                f"{FILE.name} is not what the commands say: run python scripts/commands.py", file=sys.stderr
            )
        return int(stale)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
