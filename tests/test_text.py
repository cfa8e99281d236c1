"""Streams are compared with decoding everything at once, for the ways in which tokenizers cut characters."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer

from moespac import model
from moespac.engine.text import MAX_PENDING_TOKENS, REPLACEMENT, TextStream
from moespac.errors import ConfigError

steady = settings(derandomize=True, deadline=None)
SPECIAL = b""  # a piece that decodes to nothing


class ByteLevel:
    """Tokens are numbers of byte strings, as in byte-level BPE."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.longest = 0  # tokens decoded at once

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        self.longest = max(self.longest, len(token_ids))
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")


class SentencePiece:
    """Tokens are numbers of pieces; the decoder drops a leading space and takes a run of bytes as one."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def decode(self, token_ids, *, skip_special_tokens):
        return self.decoder.decode([self.pieces[token] for token in token_ids])


TEXT = st.text(alphabet="ab é€日😀\n", max_size=30)


@st.composite
def pieces(draw, text):
    """The bytes of ``text`` cut anywhere, into tokens of up to 4 bytes and some of none."""
    data, cut = text.encode(), []
    while data:
        size = draw(st.integers(0, 4))
        cut.append(data[:size])
        data = data[size:]
    return cut


def stream(tokenizer, count, stop=()):
    """One token at a time: (what each push gave, the stream)."""
    text = TextStream(tokenizer, stop)
    return [text.push([token]) for token in range(count)], text


def first_stop(text, stops):
    """Text before the stop string that completes first, character by character; None without one."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@steady
@given(st.data(), TEXT)
def test_the_parts_are_the_whole_and_never_half_a_character(data, text):
    cut = data.draw(pieces(text))
    parts, rest = stream(ByteLevel(cut), len(cut))
    assert REPLACEMENT not in "".join(parts)
    assert "".join(parts) + rest.flush() == text
    assert "".join(parts) == text  # complete text waits for nothing


@steady
@given(st.data(), st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_as_if_read_character_by_character(data, text, stops):
    cut = data.draw(pieces(text))
    parts, rest = stream(ByteLevel(cut), len(cut), stops)
    got = "".join(parts) + rest.flush()
    cut_text = first_stop(text, stops)
    assert rest.stopped == (cut_text is not None)
    assert got == (text if cut_text is None else cut_text)
    read = b"".join(cut[: rest.kept]).decode(errors="ignore")
    if rest.stopped:  # the last kept token is the one that completed it
        assert first_stop(read, stops) is not None
        assert first_stop(b"".join(cut[: rest.kept - 1]).decode(errors="ignore"), stops) is None
    else:
        assert rest.kept == len(cut)


@steady
@given(st.data(), TEXT, st.text("ab é€", min_size=1, max_size=4))
def test_pushing_many_tokens_is_pushing_them_one_by_one(data, text, stop):
    cut = data.draw(pieces(text))
    one_by_one, expected = stream(ByteLevel(cut), len(cut), [stop])
    at_once = TextStream(ByteLevel(cut), [stop])
    assert at_once.push(range(len(cut))) == "".join(one_by_one)
    assert (at_once.stopped, at_once.kept) == (expected.stopped, expected.kept)


@steady
@given(st.lists(st.sampled_from(["▁the", "▁", "a", "▁b", "", "<euro>", "<emoji>"]), max_size=12))
def test_sentencepiece_with_byte_fallback(words):
    spelled = {
        "<euro>": [f"<0x{b:02X}>" for b in "€".encode()],
        "<emoji>": [f"<0x{b:02X}>" for b in "😀".encode()],
    }
    cut = [piece for word in words for piece in spelled.get(word, [word])]
    tokenizer = SentencePiece(cut)
    parts, rest = stream(tokenizer, len(cut))
    assert REPLACEMENT not in "".join(parts)
    assert "".join(parts) + rest.flush() == tokenizer.decode(list(range(len(cut))), skip_special_tokens=True)


def test_the_demo_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(Path(model.__file__).parent / "demo" / "target")
    sentence = "naïve 日本語, 5 € – 😀👍🏽!\n\tdef f(x):  return x\n"
    token_ids = [*tokenizer.encode(sentence), tokenizer.eos_token_id]
    parts = TextStream(tokenizer)
    pushed = [parts.push([token]) for token in token_ids]
    assert "".join(pushed) == sentence
    assert any(tokenizer.decode([token]) != part for token, part in zip(token_ids, pushed, strict=True))
    stopped = TextStream(tokenizer, ["語, 5", "f(x)"])
    assert stopped.push(token_ids) == "naïve 日本"
    assert tokenizer.decode(token_ids[: stopped.kept]) == "naïve 日本語, 5"


def test_a_character_cut_short_is_shown_at_the_end():
    parts, rest = stream(ByteLevel([b"ok", b"\xe2\x82"]), 2)
    assert (parts, rest.flush()) == (["ok", ""], REPLACEMENT)


def test_a_possible_stop_is_held_back_and_given_out_when_it_is_not_one():
    parts, rest = stream(ByteLevel([b"a<", b"e", b"x>", b"<en"]), 4, ["<end>"])
    assert (parts, rest.flush()) == (["a", "", "<ex>", ""], "<en")
    assert not rest.stopped


@pytest.mark.parametrize(
    ("pushed", "stops", "text"),
    [
        ([b"xabcd"], ["abcd", "bc"], "xa"),  # "bc" completes first
        ([b"xabc"], ["bc", "abc"], "x"),  # both at once: the longer
        ([b"xa", b"a", b"ab"], ["aab"], "xa"),  # the longest possible beginning is held back
    ],
)
def test_which_stop_counts(pushed, stops, text):
    parts, rest = stream(ByteLevel(pushed), len(pushed), stops)
    assert ("".join(parts), rest.flush(), rest.stopped) == (text, "", True)


def test_a_stop_in_the_middle_of_a_push_and_of_a_token():
    text = TextStream(ByteLevel([b"a", b"b<e", b"nd>c\xe2", b"d"]), ["<end>"])
    assert text.push([0, 1, 2, 3]) == "ab"
    assert (text.stopped, text.kept) == (True, 3)
    assert (text.push([3]), text.flush(), text.kept) == ("", "", 3)


def test_special_tokens_are_silent():
    parts, rest = stream(ByteLevel([SPECIAL, b"a", SPECIAL, b"\xc3", SPECIAL, b"\xa9"]), 6)
    assert ("".join(parts), rest.flush()) == ("aé", "")


@pytest.mark.parametrize("piece", [b"a", b"\xff", b"\xe2\x82\xac\xe2", SPECIAL])
def test_a_token_costs_a_constant(piece):
    tokenizer = ByteLevel([piece] * 400)
    parts, rest = stream(tokenizer, 400)
    assert tokenizer.longest <= 2 * MAX_PENDING_TOKENS
    if piece == b"\xff":
        assert "".join(parts) + rest.flush() == REPLACEMENT * 400
        assert len("".join(parts)) > 300  # garbage is shown while it comes


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match=r"^[^\n]*$"):
        TextStream(ByteLevel([]), ["end", ""])
