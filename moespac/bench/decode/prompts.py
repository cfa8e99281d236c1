"""What is continued: a few texts of our own, one of each kind that people bring, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespac.model.load import load_tokenizer


@dataclass(frozen=True)
class Text:
    """What is asked, or a text to continue as it stands."""

    category: str
    text: str
    chat: bool = True


BUILT_IN = (
    Text("chat", "I have a free afternoon and it is raining. What would you do with it, and why?"),
    Text("code", 'def median(values):\n    """The middle value of a list of numbers."""\n', chat=False),
    Text(
        "maths",
        "A baker sells 12 rolls at 3 coins each and 5 loaves at 8 coins each. How much is that in all?",
    ),
    Text(
        "summarise",
        "Say in one sentence what this is about: The ferry left an hour late because of fog. Half of the travellers"
        " had gone home by then, and the captain gave those who stayed their fare back.",
    ),
    Text("question", "Why does the moon show the same side to the earth all the time?"),
    Text("translate", "Translate into English: Der Hund schläft unter dem Tisch, weil es draußen regnet."),
)
WARMUP = Text("warm-up", "Tell me about a river that you know, from its spring to the sea.")


def tokenize(texts: Sequence[Text], model: Path) -> list[list[int]]:
    """Token ids of each text, questions in the model's chat template where it has one."""
    tokenizer: Any = load_tokenizer(model)
    return [_tokens(text, tokenizer) for text in texts]


def _tokens(text: Text, tokenizer: Any) -> list[int]:
    if not text.chat or tokenizer.chat_template is None:
        return tokenizer.encode(text.text)
    messages = [{"role": "user", "content": text.text}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])
