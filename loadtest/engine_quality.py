"""What stands beside the speeds of `loadtest.engine`: perplexity on a fixed text, greedy agreement, and the cold start."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.engine_comparisons import MOST_INT8_PERPLEXITY
from loadtest.engine_models import BenchModel
from loadtest.engine_sides import Kind, Sides, SideSpec
from loadtest.engine_workloads import ALL_AT_ONCE, Request, group_requests
from loadtest.report import Row

PRECISIONS = ("fp32", "bf16", "int8")
WINDOW_TOKENS = 512
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_ANSWER_TOKENS = 16, 32, 64
MOST_COLD_START_S = 3.0
# Ours in fp32 and transformers' fp32 are the same arithmetic in another order.
LEAST_FP32_RATIO = 0.999


@dataclass(frozen=True, slots=True)
class Quality:
    """perplexity: of ours, by precision. huggingface_perplexity: of transformers in fp32. answers: greedy, by precision,
    with transformers' in fp32 under "huggingface"."""

    perplexity: Mapping[str, float]
    huggingface_perplexity: float
    answers: Mapping[str, list[list[int]]]

    @property
    def int8_perplexity_ratio(self) -> float:
        return self.perplexity["int8"] / self.perplexity["fp32"]


def cut_windows(text: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Consecutive and disjoint; a rest of one token has nothing to score and is left out."""
    windows = [list(text[start : start + window_tokens]) for start in range(0, len(text), window_tokens)]
    return [window for window in windows if len(window) > 1]


def perplexity_of(logprobs: Sequence[Sequence[float]]) -> float:
    """Each window begins without context; its first token is not scored."""
    return math.exp(-statistics.fmean(value for window in logprobs for value in window))


def count_common_beginning(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if left != right:
            return index
    return len(ours)


def measure_quality(model: BenchModel, sides: Sides, threads: int, text_tokens: int | None) -> Quality:
    """text_tokens: how much of the text is scored; None is all."""
    windows = cut_windows(model.text[:text_tokens], WINDOW_TOKENS)
    stride = (len(model.text) - GREEDY_PROMPT_TOKENS) // GREEDY_PROMPTS
    prompts = [
        Request(model.text[start : start + GREEDY_PROMPT_TOKENS], GREEDY_ANSWER_TOKENS)
        for start in range(0, stride * GREEDY_PROMPTS, stride)
    ]
    groups = group_requests(prompts, ALL_AT_ONCE)
    perplexity, answers = {}, {}
    contenders: list[tuple[str, Kind, str]] = [(each, "ours", each) for each in PRECISIONS]
    for name, kind, precision in [*contenders, ("huggingface", "huggingface", "fp32")]:
        side = sides.get(SideSpec(kind, str(model.folder), precision, threads))
        perplexity[name] = perplexity_of(side.score(windows))
        answers[name] = side.run(prompts, groups).answers
    return Quality(perplexity, perplexity.pop("huggingface"), answers)


def list_quality_rows(quality: Quality) -> list[Row]:
    """Perplexities as fp32's divided by the row's own, so that more is better; fp32 itself against transformers'."""
    fp32 = quality.perplexity["fp32"]
    rows = []
    for precision, against, reference, floor in (
        ("fp32", "HF fp32", quality.huggingface_perplexity, LEAST_FP32_RATIO),
        ("bf16", "fp32", fp32, None),
        ("int8", "fp32", fp32, 1 / MOST_INT8_PERPLEXITY),
    ):
        ours = quality.perplexity[precision]
        rows.append(
            Row(f"perplexity, {precision} | {against}", "e^nats", ours, reference, reference / ours, floor)
        )
    for precision, against in (("fp32", "huggingface"), ("bf16", "fp32"), ("int8", "fp32")):
        rows += _agreement_rows(
            f"{precision} | {'HF fp32' if against == 'huggingface' else against}",
            quality.answers[precision],
            quality.answers[against],
        )
    return rows


def _agreement_rows(what: str, ours: list[list[int]], theirs: list[list[int]]) -> list[Row]:
    pairs = list(zip(ours, theirs, strict=True))
    equal = sum(left == right for a, b in pairs for left, right in zip(a, b, strict=True))
    tokens = sum(len(answer) for answer in theirs)
    common = statistics.fmean(count_common_beginning(a, b) for a, b in pairs)
    return [
        Row(f"greedy tokens equal, {what}", "tokens", equal, tokens, equal / tokens),
        Row(
            f"greedy common beginning, {what}",
            "tokens",
            common,
            GREEDY_ANSWER_TOKENS,
            common / GREEDY_ANSWER_TOKENS,
        ),
    ]


def measure_cold_starts(model: BenchModel, sides: Sides, threads: int, starts: int) -> list[Row]:
    """A new process each time; the median of the seconds from the end of its imports to a first token. The file is in the
    page cache: what a disk takes is not in it."""
    rows = []
    for precision in PRECISIONS:
        seconds = []
        for _ in range(starts):
            side = sides.start(SideSpec("ours", str(model.folder), precision, threads))
            seconds.append(side.first_token_s)
            side.close()
        median_s = statistics.median(seconds)
        rows.append(
            Row(
                f"cold start to first token, {precision}",
                "s",
                median_s,
                None,
                MOST_COLD_START_S / median_s,
                1,
            )
        )
    return rows
