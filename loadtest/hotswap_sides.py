"""The sides of `loadtest.hotswap` that are engines in a child process; see `child_process`. One that uses ours, and one
that uses transformers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from loadtest.child_process import Child
from loadtest.hotswap_models import FineTunes
from loadtest.hotswap_traffic import Arrival

MAX_BATCH = 16
CONTEXT_TOKENS = 1024
PRECISION: Final = "bf16"
READY_TIMEOUT_S, REPLY_TIMEOUT_S = 300.0, 300.0

Kind = Literal["ours", "huggingface"]


class HotswapSide:
    """One process that holds the libraries, and whatever models it is told to load."""

    def __init__(self, kind: Kind, tunes: FineTunes, threads: int) -> None:
        """Raises SideError."""
        self._child = Child(
            "loadtest.hotswap_child",
            {
                "kind": kind,
                "threads": threads,
                "models": [[str(model.folder), str(model.image), model.key] for model in tunes.models],
            },
            f"{kind} of loadtest.hotswap",
            {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            ready_timeout_s=READY_TIMEOUT_S,
            reply_timeout_s=REPLY_TIMEOUT_S,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()

    def first_token_s(self, model: int, *, in_full: bool = False) -> float:
        """From the decision to load to a first token; the model is let go afterwards. in_full: for ours, the canary is asked
        as at an image's first use; for transformers, the tokenizer is loaded too."""
        return float(self._ask({"do": "first_token", "model": model, "in_full": in_full})["seconds"])

    def decode_rate(self, seconds: float, *, beside_loads: bool, streams: int) -> tuple[float, int]:
        """Tokens/s of one model that answers that many streams, and how often another was loaded meanwhile."""
        reply = self._ask(
            {"do": "decode", "seconds": seconds, "beside_loads": beside_loads, "streams": streams}
        )
        return float(reply["tokens_per_s"]), int(reply["loads"])

    def answer_from_folder(self, model: int, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy, of the model as it was registered, without its image."""
        answer: list[int] = self._ask({"do": "answer", "model": model, "prompt": prompt, "tokens": tokens})[
            "answer"
        ]
        return answer

    def replay(self, trace: Sequence[Arrival], slots: int) -> list[float | None]:
        """Strictly in order of arrival, with memory for `slots` models: when each was answered, from its arrival."""
        arrivals = [dataclasses.astuple(arrival) for arrival in trace]
        latencies: list[float | None] = self._ask({"do": "replay", "trace": arrivals, "slots": slots})[
            "latencies"
        ]
        return latencies

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        return self._child.ask(question)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelPaths:
    """As a child is told of them."""

    folder: Path
    image: Path
    key: str
