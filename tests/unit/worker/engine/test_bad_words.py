"""Bad words: which token completes a banned sequence, and that no answer of the engine holds one."""

from __future__ import annotations

import random

import pytest

from services.worker.engine import EngineRefusal, Sampling
from services.worker.engine.bad_words import banned_tokens, compile_bad_words
from tests.unit.worker.engine.builders import EOS, VOCAB_SIZE, make_engine, make_request, run_all
from tests.unit.worker.engine.conftest import TinyModel


@pytest.mark.parametrize(
    ("sequences", "answer", "banned"),
    [
        ([], [1, 2], []),
        ([[7]], [], [7]),
        ([[7]], [1, 7, 2], [7]),
        ([[7], [7]], [], [7]),
        ([[1, 2]], [], []),
        ([[1, 2]], [1], [2]),
        ([[1, 2]], [1, 3], []),
        ([[1, 2]], [3, 1], [2]),
        ([[1, 2, 3]], [2], []),
        ([[1, 2, 3]], [1, 2], [3]),
        ([[1, 2, 3]], [9, 1, 2], [3]),
        ([[1, 2, 3], [2, 4], [2, 5]], [1, 2], [3, 4, 5]),
        ([[1, 2, 3], [2, 3], [3]], [1, 2], [3]),
        ([[1, 1]], [1, 1], [1]),
        ([[1, 1, 2]], [1, 1, 1], [2]),
    ],
)
def test_the_token_that_would_complete_a_sequence_is_banned(
    sequences: list[list[int]], answer: list[int], banned: list[int]
) -> None:
    assert sorted(banned_tokens(compile_bad_words(sequences), answer)) == banned


def test_banning_agrees_with_a_plain_search() -> None:
    rng = random.Random(3)
    for _ in range(300):
        sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(0, 5))]
        answer = [rng.randrange(3) for _ in range(rng.randint(0, 6))]
        plain = [
            token
            for token in range(3)
            if any([*answer, token][-len(sequence) :] == sequence for sequence in sequences)
        ]
        assert sorted(banned_tokens(compile_bad_words(sequences), answer)) == plain


def test_an_empty_sequence_cannot_be_banned() -> None:
    with pytest.raises(ValueError, match="empty"):
        compile_bad_words([[1], []])


def holds(answer: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(answer[i : i + len(word)]) == word for i in range(len(answer)))


def test_no_answer_holds_a_bad_word_greedy_or_drawn(tiny: TinyModel) -> None:
    """What the free answer says is banned, in pieces of one to three tokens, until a new answer holds none of it."""
    prompt = [5, 90, 201, 33]
    for knobs in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4, "top_k": 30}):
        free = run_all(
            make_engine(tiny.folder),
            [make_request("a", prompt, 24, sampling=Sampling(**knobs))],  # type: ignore[arg-type]
        )["a"].tokens
        words = ((free[0],), (free[2], free[3]), (free[6], free[7], free[8]))
        sampling = Sampling(**knobs, bad_words=words)  # type: ignore[arg-type]
        answer = run_all(make_engine(tiny.folder), [make_request("a", prompt, 24, sampling=sampling)])["a"]
        assert any(holds(free, word) for word in words)
        assert not any(holds(answer.tokens, word) for word in words)


def test_a_bad_word_that_began_before_a_resume_is_still_banned(tiny: TinyModel) -> None:
    prompt, greedy = [5, 90, 201, 33], {"temperature": 0.0}
    free = run_all(make_engine(tiny.folder), [make_request("a", prompt, 12, sampling=Sampling(**greedy))])[  # type: ignore[arg-type]
        "a"
    ].tokens
    sampling = Sampling(temperature=0.0, bad_words=((free[3], free[4], free[5]),))
    whole = run_all(make_engine(tiny.folder), [make_request("a", prompt, 12, sampling=sampling)])["a"].tokens
    assert whole[:5] == free[:5] and whole[5] != free[5]
    resumed = make_request("a", prompt, 12, sampling=sampling, prior_tokens=whole[:5])
    assert run_all(make_engine(tiny.folder), [resumed])["a"].tokens == whole[5:]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (((1,), ()), "invalid_request"),
        (((VOCAB_SIZE,),), "invalid_token_id"),
        (((1, -1),), "invalid_token_id"),
        (tuple((token,) for token in range(VOCAB_SIZE) if token != EOS), "invalid_request"),
    ],
)
def test_bad_words_that_cannot_be_served_are_refused(
    tiny: TinyModel, words: tuple[tuple[int, ...], ...], code: str
) -> None:
    engine = make_engine(tiny.folder)
    with pytest.raises(EngineRefusal) as refused:
        engine.add(make_request("a", [1, 2], sampling=Sampling(temperature=0.0, bad_words=words)))
    assert refused.value.code == code
    assert not engine.has_work
