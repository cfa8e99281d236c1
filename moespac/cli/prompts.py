"""Prompts from a file: lines of JSON, as benchmarks publish them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespac.cli.files import read_text
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from moespac.engine.engine import Engine


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a question to answer in the model's chat template."""

    text: str
    chat: bool = False
    category: str = ""

    def for_engine(self, engine: Engine) -> str | list[int]:
        """What ``Engine.stream`` takes."""
        return engine.chat_tokens([{"role": "user", "content": self.text}]) if self.chat else self.text


def read_prompts(file: Path, flag: str) -> list[Prompt]:
    """Each line an object with ``prompt``, or ``turns`` of which the first is asked. Raises ConfigError."""
    lines = [line for line in read_text(file, flag).splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f'{flag} {file}: holds no prompts; write lines like {{"prompt": "The sea"}}')
    return [_prompt(line, f"{flag} {file}: line {number}") for number, line in enumerate(lines, start=1)]


def _prompt(line: str, where: str) -> Prompt:
    from moespac.trace.importer import category_of  # numpy: not before a command needs it

    try:
        fields: Any = json.loads(line)
        asked = fields["turns"][0] if "turns" in fields else fields["prompt"]
        if not isinstance(asked, str) or not asked:
            raise ValueError("it is not text")
        return Prompt(asked, "turns" in fields, category_of(fields))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f'{where} is no {{"prompt": "text"}} or {{"turns": ["text"]}}; correct it'
        ) from None
