"""``moespac chat`` in a terminal of its own: typing, history, Ctrl-C."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

PROMPT = "\x1b[?2004h"  # brackets what is pasted: sent when a line is about to be read
SENT = "\x1b[?2004l"
ENDLESS = ("--temperature", "5")  # nearly every token is as likely as the end: the answer takes half a minute
CTRL_C, ESCAPE, UP = "\x03", "\x1b", "\x1b[A"


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[object]:
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path),
        "NO_COLOR": "1",
        "TERM": "xterm",
        "PYTHONPATH": os.getcwd(),
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here answers where the cursor is
    }
    child = pexpect.spawn(
        sys.executable, ["-m", "moespac", "chat", "--no-profile", "--max-new-tokens", "1500", *ENDLESS],
        env=environment, encoding="utf-8", timeout=90, dimensions=(24, 100),
    )  # fmt: skip
    yield child
    child.close(force=True)


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, tmp_path: Path) -> None:
    chat.expect("/exit leaves")
    chat.expect_exact(PROMPT)
    chat.send("Tell me about the sea" + ESCAPE + "\r" + "and its ships\r")  # two rows
    chat.expect_exact(SENT)
    chat.expect(r"\w{2}.*\w{2}")  # the answer has begun
    chat.send(CTRL_C)
    chat.expect_exact(PROMPT)
    chat.send("/stats\r")
    chat.expect("interrupted")
    chat.expect("tokens/s decoding")

    saved = tmp_path / "talk.json"
    chat.send(f"/save {saved}\r")
    chat.expect("saved 2 messages")
    assert "Tell me about the sea\\nand its ships" in saved.read_text()

    chat.send("half a line" + CTRL_C)
    chat.expect("Ctrl-D or /exit leaves")
    chat.send(UP + UP + "\r")  # /save is the last that was sent, /stats the one before
    chat.expect("tokens/s decoding")
    chat.send("/exit\r")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert "+/stats" in (tmp_path / "moespac" / "chat_history").read_text()


def test_no_color_is_honoured(chat) -> None:
    chat.expect("/exit leaves")
    chat.expect_exact(PROMPT)
    chat.send("/stats\r")
    chat.expect("nothing was answered yet")
    chat.expect_exact(PROMPT)
    chat.send("\x04")
    chat.expect(pexpect.EOF)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", chat.before)
