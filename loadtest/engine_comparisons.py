"""Which rows `loadtest.engine` has: ours against whom, on which workload, with floor and target; and their ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.engine_models import BenchModel
from loadtest.engine_sides import Kind, SideSpec, Timing
from loadtest.engine_workloads import (
    ALL_AT_ONCE,
    FEW_STATIC_PLANS,
    GPTJ_ANSWER_TOKENS,
    GPTJ_PROMPT_TOKENS,
    ONE_BY_ONE,
    RAGGED_ANSWER_TOKENS,
    RAGGED_PROMPT_TOKENS,
    RAGGED_REQUESTS,
    STATIC_PLANS,
    STREAM_ANSWER_TOKENS,
    STREAM_PROMPT_TOKENS,
    STREAM_REQUESTS,
    Plan,
    Request,
    Shape,
    make_ragged_shape,
    make_stream_shape,
)
from loadtest.report import Row

MOST_INT8_PERPLEXITY = 1.02
"""int8 counts only while its perplexity is at most this many times that of fp32."""


@dataclass(frozen=True, slots=True)
class Opponent:
    """manner: how it is asked, in words. plans: the best of them is what ours is compared with."""

    label: str
    manner: str
    spec: SideSpec
    plans: tuple[Plan, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """key: the name of the row on the command line. opponents: the fastest counts; others are measured if `is_each_shown`.

    is_quality_bound: the row counts only at the perplexity that int8 has to keep.
    """

    key: str
    name: str
    model: BenchModel
    shape: Shape
    ours: SideSpec
    opponents: tuple[Opponent, ...]
    floor: float | None
    target: float | None
    is_quality_bound: bool = False
    is_each_shown: bool = False

    @property
    def specs(self) -> tuple[SideSpec, ...]:
        return (self.ours, *(opponent.spec for opponent in self.opponents))


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one run. decoding: without the time to the first token; None where requests ran together."""

    end_to_end: float
    decoding: float | None


def rates_of(requests: Sequence[Request], timing: Timing) -> Rates:
    """Only tokens that were asked for count, whatever else a side computed."""
    tokens = sum(request.answer_tokens for request in requests)
    decoding = None
    if timing.decode_seconds > 0:
        decoding = (tokens - len(requests)) / timing.decode_seconds
    return Rates(tokens / timing.seconds, decoding)


def make_ratio_row(
    name: str,
    pairs: Sequence[tuple[float, float]],
    floor: float | None,
    target: float | None,
    unit: str = "tokens/s",
) -> Row:
    """pairs: (ours, theirs). The ratio is the median of the pairs' ratios, not the ratio of the medians."""
    return Row(
        name,
        unit,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        statistics.median(ours / theirs for ours, theirs in pairs),
        floor,
        target,
    )


def withhold_ratio(row: Row, perplexity_ratio: float) -> Row:
    """The row as it is at a perplexity that int8 may have; else its ratio is gone, which is below any floor."""
    if perplexity_ratio <= MOST_INT8_PERPLEXITY:
        return row
    return replace(row, name=f"{row.name} (does not count: perplexity {perplexity_ratio:.3f}x)", ratio=None)


SHAPES: Mapping[str, Shape] = {
    "ragged": make_ragged_shape(RAGGED_PROMPT_TOKENS, RAGGED_ANSWER_TOKENS, RAGGED_REQUESTS),
    "stream": make_stream_shape(STREAM_REQUESTS, STREAM_PROMPT_TOKENS, STREAM_ANSWER_TOKENS),
    "gptj": make_ragged_shape(GPTJ_PROMPT_TOKENS, GPTJ_ANSWER_TOKENS, RAGGED_REQUESTS),
}
QUICK_SHAPES: Mapping[str, Shape] = {
    "ragged": make_ragged_shape((4, 32), (2, 8), RAGGED_REQUESTS),
    "stream": make_stream_shape(1, 16, 8),
    "gptj": make_ragged_shape((4, 32), (2, 8), RAGGED_REQUESTS),
}


@dataclass(frozen=True, slots=True)
class Field:
    """What all rows of one run share."""

    threads: int
    shapes: Mapping[str, Shape]

    def side(self, model: BenchModel, kind: Kind, precision: str) -> SideSpec:
        return SideSpec(kind, str(model.folder), precision, self.threads)

    def static(self, model: BenchModel, precision: str, plans: tuple[Plan, ...] = STATIC_PLANS) -> Opponent:
        return Opponent(
            f"HF generate {precision}",
            ", best static batch",
            self.side(model, "huggingface", precision),
            plans,
        )

    def one_by_one(self, model: BenchModel, precision: str) -> Opponent:
        return Opponent(
            f"HF generate {precision}",
            ", one by one",
            self.side(model, "huggingface", precision),
            (ONE_BY_ONE,),
        )

    def llamacpp(self, quantization: str, gguf: Path, parallel: int) -> Opponent:
        plan = ONE_BY_ONE if parallel == 1 else ALL_AT_ONCE
        spec = SideSpec("llamacpp", str(gguf), quantization, self.threads, parallel)
        return Opponent(f"llama.cpp {quantization}", "", spec, (plan,))


def list_smollm2_comparisons(field: Field, model: BenchModel) -> list[Comparison]:
    ragged, stream = field.shapes["ragged"], field.shapes["stream"]
    bf16, int8 = (field.side(model, "ours", precision) for precision in ("bf16", "int8"))
    static_bf16, static_fp32 = field.static(model, "bf16"), field.static(model, "fp32")
    alone = field.one_by_one(model, "bf16")
    continuous = Opponent(
        "HF generate_batch bf16", "", field.side(model, "continuous", "bf16"), (ALL_AT_ONCE,)
    )

    def compare(
        key: str, what: str, shape: Shape, ours: SideSpec, against: Opponent, floor: float, target: float
    ) -> Comparison:
        name = f"{what}, {ours.precision} | {against.label}{against.manner}"
        return Comparison(key, name, model, shape, ours, (against,), floor, target, ours is int8)

    return [
        compare("static-bf16", "16 ragged", ragged, bf16, static_bf16, 1.5, 2.5),
        compare("one-by-one", "16 ragged", ragged, bf16, alone, 4, 6),
        compare("int8-fp32", "16 ragged", ragged, int8, static_fp32, 4, 6),
        compare("int8-bf16", "16 ragged", ragged, int8, static_bf16, 2, 3.5),
        compare("continuous", "16 ragged", ragged, bf16, continuous, 3, 8),
        compare("stream", "one stream", stream, int8, alone, 2, 3.5),
    ]


def list_llamacpp_comparisons(field: Field, model: BenchModel, ggufs: Mapping[str, Path]) -> list[Comparison]:
    int8 = field.side(model, "ours", "int8")

    def compare(key: str, what: str, shape: str, parallel: int, floor: float, target: float) -> Comparison:
        opponents = tuple(field.llamacpp(name, gguf, parallel) for name, gguf in ggufs.items())
        return Comparison(
            *(key, f"{what}, int8 | llama.cpp", model, field.shapes[shape], int8, opponents, floor, target),
            is_quality_bound=True,
            is_each_shown=True,
        )

    return [
        compare("stream-llamacpp", "one stream", "stream", 1, 0.8, 1.1),
        compare("ragged-llamacpp", "16 ragged", "ragged", RAGGED_REQUESTS, 1.5, 2.5),
    ]


def list_gptj_comparisons(field: Field, model: BenchModel) -> list[Comparison]:
    """Random weights have no quality to compare, so ours is bf16, which the checkpoint is."""
    ours = field.side(model, "ours", "bf16")
    opponents = tuple(field.static(model, each, FEW_STATIC_PLANS) for each in ("bf16", "fp32"))
    name = "GPT-J 4 layers, 16 ragged, bf16 | HF generate, best precision and static batch"
    return [Comparison("gptj", name, model, field.shapes["gptj"], ours, opponents, 2, 4)]
