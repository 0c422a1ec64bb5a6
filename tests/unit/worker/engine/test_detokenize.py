"""Streaming text: whole characters, stop strings cut wherever tokens break them, the same for any replay."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.worker.engine import ModelRefusal
from services.worker.engine.detokenize import (
    ByteTable,
    Released,
    TextStream,
    earliest_stop,
    possible_stop_length,
    read_byte_table,
)
from tests.unit.worker.engine.builders import SENTENCES

TEXTS = (
    *SENTENCES,
    "plain",
    "a\u0301 combining, \U0001f468\u200d\U0001f469\u200d\U0001f467 joined, \ufffd itself",
    "tabs\tand\nlines  and   spaces",
)


def table_of(*pieces: str | bytes) -> ByteTable:
    return ByteTable([piece.encode() if isinstance(piece, str) else piece for piece in pieces])


def stream_all(table: ByteTable, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces in order, the flushed rest last, and whether a stop string ended it."""
    stream = TextStream(table, stop)
    pieces = []
    for token in tokens:
        released = stream.push(token)
        pieces.append(released.text)
        if released.is_stopped:
            return pieces, True
    return [*pieces, stream.flush()], False


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_the_tokenizers_own_decoding(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text).ids
    pieces, _ = stream_all(read_byte_table(tokenizer.to_str().encode()), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text


def test_any_token_list_streams_to_the_tokenizers_own_decoding(tokenizer: Tokenizer) -> None:
    """Random tokens break characters everywhere; both replace what is no character."""
    table = read_byte_table(tokenizer.to_str().encode())
    rng = random.Random(5)
    for _ in range(200):
        tokens = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 30))]
        pieces, _ = stream_all(table, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_no_piece_ends_inside_a_character() -> None:
    emoji = "😀".encode()
    table = table_of("x", emoji[:1], emoji[1:3], emoji[3:], emoji)
    pieces, _ = stream_all(table, [0, 1, 2, 3, 4, 0])
    assert pieces == ["x", "", "", "😀", "😀", "x", ""]


def test_broken_character_is_replaced_as_soon_as_nothing_can_mend_it() -> None:
    table = table_of("x", b"\xf0\x9f")
    assert stream_all(table, [1, 0])[0] == ["", "\ufffdx", ""]


def test_flush_replaces_an_unfinished_character() -> None:
    assert stream_all(table_of(b"\xf0\x9f"), [0])[0] == ["", "\ufffd"]


def test_special_tokens_have_no_text_and_ids_beyond_the_tokenizer_neither(tokenizer: Tokenizer) -> None:
    table = read_byte_table(tokenizer.to_str().encode())
    assert [
        table[number] for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    ] == [b""] * 3
    assert table[10**6] == b""


STOP_CASES: list[tuple[str, list[str], tuple[str, ...], list[str], bool]] = [
    ("none", ["ab", "cd"], (), ["ab", "cd", ""], False),
    ("inside one token", ["abSTOPcd"], ("STOP",), ["ab"], True),
    ("across three tokens", ["abS", "TO", "Pcd"], ("STOP",), ["ab", "", ""], True),
    ("begun and not finished", ["abST", "x"], ("STOP",), ["ab", "STx", ""], False),
    ("begun at the end", ["abST"], ("STOP",), ["ab", "ST"], False),
    ("begun twice", ["aS", "STO", "P"], ("STOP",), ["a", "S", ""], True),
    ("overlapping itself", ["aaa", "b"], ("aab",), ["a", ""], True),
    ("the earliest of two", ["x##y--"], ("--", "##"), ["x"], True),
    ("the shorter, complete first", ["ab", "c"], ("abcd", "bc"), ["", "a"], True),
    ("the longer holds, the shorter misses", ["ab", "x"], ("abcd", "bc"), ["", "abx", ""], False),
    ("at the very start", ["STOP"], ("STOP",), [""], True),
    ("newlines", ["one\n", "\ntwo"], ("\n\n",), ["one", ""], True),
    ("empty stop strings are none", ["ab"], ("",), ["ab", ""], False),
    ("a character beyond ASCII", ["日", "本"], ("本",), ["日", ""], True),
]


@pytest.mark.parametrize(
    ("_name", "pieces", "stop", "expected", "is_stopped"), STOP_CASES, ids=[c[0] for c in STOP_CASES]
)
def test_stop_strings(
    _name: str, pieces: list[str], stop: tuple[str, ...], expected: list[str], is_stopped: bool
) -> None:
    assert stream_all(table_of(*pieces), list(range(len(pieces))), stop) == (expected, is_stopped)


def test_stop_string_split_inside_a_character_is_found() -> None:
    text = "né!".encode()
    table = table_of(*[text[at : at + 1] for at in range(len(text))])
    pieces, is_stopped = stream_all(table, list(range(len(text))), ("é!",))
    assert ("".join(pieces), is_stopped) == ("n", True)


def test_stop_strings_are_ignored_before_min_tokens() -> None:
    stream = TextStream(table_of("a.", "b.", "c."), (".",), min_tokens=2)
    assert [stream.push(token) for token in range(3)] == [
        Released("a."),
        Released("b."),
        Released("c", is_stopped=True),
    ]


def test_streamed_text_equals_the_cut_of_the_whole_for_any_split() -> None:
    """Property: where tokens break never matters. The reference looks at the whole text one character at a time."""
    rng = random.Random(9)
    for _ in range(500):
        text = "".join(rng.choice("abé\n") for _ in range(rng.randrange(1, 25)))
        stop = tuple(
            "".join(rng.choice("abé\n") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(3))
        )
        data = text.encode()
        cuts = sorted(rng.sample(range(len(data) + 1), k=min(len(data), rng.randrange(6))))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        streamed, is_stopped = stream_all(table_of(*pieces), list(range(len(pieces))), stop)
        ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
        assert is_stopped == bool(ends)
        if not ends:
            assert "".join(streamed) == text
        else:
            # A token may bring more than the first complete stop string; an earlier-starting one in it then wins.
            first = min(text.find(each) for each in stop if text[: ends[0]].endswith(each))
            assert text.startswith("".join(streamed))
            assert len("".join(streamed)) <= first


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("", ("a",), 0),
        ("xa", ("ab",), 1),
        ("xab", ("abc", "b"), 2),
        ("aa", ("aaa",), 2),
        ("ab", ("ab",), 0),
        ("a", (), 0),
    ],
)
def test_possible_stop_length_is_the_longest_begun_stop_string(
    text: str, stop: tuple[str, ...], expected: int
) -> None:
    assert possible_stop_length(text, stop) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"), [("abc", ("c", "b"), 1), ("abc", ("x",), None), ("abc", (), None)]
)
def test_earliest_stop(text: str, stop: tuple[str, ...], expected: int | None) -> None:
    assert earliest_stop(text, stop) == expected


def sentencepiece_json(**changes: Any) -> bytes:
    document = {
        "added_tokens": [
            {"id": 0, "content": "</s>", "special": True},
            {"id": 6, "content": "<tool>", "special": False},
        ],
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {"</s>": 0, "▁Hello": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "<0xZZ>": 5},
        },
    }
    return json.dumps({**document, **changes}).encode()


def test_byte_fallback_tokens_join_to_characters_and_the_leading_space_stays() -> None:
    table = read_byte_table(sentencepiece_json())
    assert "".join(stream_all(table, [1, 2, 3, 4, 5, 6, 0])[0]) == " Hello€<0xZZ><tool>"


def test_unigram_vocabulary_is_read_by_position() -> None:
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0]]}
    table = read_byte_table(sentencepiece_json(model=model, added_tokens=[], decoder={"type": "Metaspace"}))
    assert [table[0], table[1]] == [b"<unk>", b" a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        sentencepiece_json(decoder=None),
        sentencepiece_json(decoder={"type": "WordPiece"}),
        sentencepiece_json(model={"vocab": 3}),
        sentencepiece_json(added_tokens=[{"id": "x"}]),
    ],
)
def test_tokenizer_that_cannot_be_streamed_is_refused(content: bytes) -> None:
    with pytest.raises(ModelRefusal, match=r"tokenizer\.json"):
        read_byte_table(content)
