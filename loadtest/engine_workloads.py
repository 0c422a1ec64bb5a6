"""What both sides of `loadtest.engine` are asked: requests with exact lengths, and how a side may group them. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Order = Literal["prompt", "answer"]

RAGGED_REQUESTS = 16
RAGGED_PROMPT_TOKENS, RAGGED_ANSWER_TOKENS = (16, 256), (16, 128)
# Four layers of GPT-J's shape hold nine times as many weights as SmolLM2: a quarter of the lengths keeps a run below a minute.
GPTJ_PROMPT_TOKENS, GPTJ_ANSWER_TOKENS = (8, 64), (8, 32)
STREAM_REQUESTS, STREAM_PROMPT_TOKENS, STREAM_ANSWER_TOKENS = 4, 64, 64
LENGTHS_SEED = 16
# Two random tokens before the text: no two prompts of a whole run share their beginning, so no cached prefix helps anyone.
UNIQUE_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens of the requests of one workload; every run of it has the same."""

    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    # One request after another instead of all at once.
    is_one_by_one: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """answer_tokens: the answer runs to exactly this length, whatever the model says."""

    prompt: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a side is given the requests: groups one after another, those of a group at once.

    batch: requests in a group; None is all. order: by what they are sorted first; None leaves them as they come.
    """

    batch: int | None = None
    order: Order | None = None

    def __str__(self) -> str:
        if self.batch is None:
            return "all at once"
        if self.batch == 1:
            return "one by one"
        return f"batches of {self.batch}" + (f" sorted by {self.order} length" if self.order else "")


ALL_AT_ONCE, ONE_BY_ONE = Plan(), Plan(batch=1)
# In one batch of all sixteen the order changes nothing.
STATIC_PLANS = (
    Plan(16, "answer"),
    Plan(8, "answer"),
    Plan(8, "prompt"),
    Plan(4, "answer"),
    Plan(4, "prompt"),
)
# Where a run takes most of a minute; smaller batches read the weights more often for each token.
FEW_STATIC_PLANS = (Plan(16, "answer"), Plan(8, "answer"))


def make_ragged_shape(prompt_tokens: tuple[int, int], answer_tokens: tuple[int, int], count: int) -> Shape:
    """Uniform lengths within the two bounds, inclusive, the same at every call."""
    rng = random.Random(LENGTHS_SEED)
    pairs = [(rng.randint(*prompt_tokens), rng.randint(*answer_tokens)) for _ in range(count)]
    return Shape(tuple(prompt for prompt, _ in pairs), tuple(answer for _, answer in pairs))


def make_stream_shape(count: int, prompt_tokens: int, answer_tokens: int) -> Shape:
    return Shape((prompt_tokens,) * count, (answer_tokens,) * count, is_one_by_one=True)


def make_requests(shape: Shape, text: Sequence[int], vocab_size: int, run: int) -> list[Request]:
    """The requests of run number `run`: cut from `text` at random places, or random tokens where `text` is empty."""
    rng = random.Random(f"{LENGTHS_SEED} {run}")
    return [
        Request(_make_prompt(rng, prompt_tokens, text, vocab_size), answer_tokens)
        for prompt_tokens, answer_tokens in zip(shape.prompt_tokens, shape.answer_tokens, strict=True)
    ]


def _make_prompt(rng: random.Random, count: int, text: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if not text:
        return tuple(rng.randrange(vocab_size) for _ in range(count))
    unique = [rng.randrange(vocab_size) for _ in range(min(UNIQUE_TOKENS, count))]
    start = rng.randrange(len(text))
    cut = [text[(start + index) % len(text)] for index in range(count - len(unique))]
    return (*unique, *cut)


def group_requests(requests: Sequence[Request], plan: Plan) -> list[list[int]]:
    """Indices of the requests, in groups as the plan says. A group of one batch computes until its longest answer ends."""
    indices = list(range(len(requests)))
    if plan.order == "answer":
        indices.sort(key=lambda index: requests[index].answer_tokens)
    elif plan.order == "prompt":
        indices.sort(key=lambda index: len(requests[index].prompt))
    size = plan.batch or len(requests)
    return [indices[start : start + size] for start in range(0, len(indices), size)]
