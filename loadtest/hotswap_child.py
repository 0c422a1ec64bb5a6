"""The process of one side of `loadtest.hotswap`: see `child_process`; started by `hotswap_sides.HotswapSide`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from loadtest.child_process import Answer, serve_parent
from loadtest.hotswap_sides import ModelPaths
from loadtest.hotswap_traffic import Arrival


class Contender(Protocol):
    def first_token_s(self, model: int, *, in_full: bool = False) -> float: ...
    def answer(self, model: int, prompt: list[int], tokens: int) -> list[int]: ...
    def replay(self, trace: list[Arrival], slots: int) -> list[float | None]: ...
    def decode(self, seconds: float, *, beside_loads: bool, streams: int) -> tuple[float, int]: ...


def make_contender(argument: dict[str, Any]) -> Contender:
    models = [ModelPaths(Path(folder), Path(image), key) for folder, image, key in argument["models"]]
    if argument["kind"] == "ours":
        from loadtest.hotswap_ours import Ours

        return Ours(models, argument["threads"])
    from loadtest.hotswap_huggingface import HuggingFace

    return HuggingFace(models, argument["threads"])


def answer(contender: Contender, question: dict[str, Any]) -> dict[str, Any]:
    match question["do"]:
        case "first_token":
            return {"seconds": contender.first_token_s(question["model"], in_full=question["in_full"])}
        case "answer":
            return {"answer": contender.answer(question["model"], question["prompt"], question["tokens"])}
        case "replay":
            trace = [
                Arrival(at_s, model, tuple(prompt), tokens)
                for at_s, model, prompt, tokens in question["trace"]
            ]
            return {"latencies": contender.replay(trace, question["slots"])}
        case "decode":
            rate, loads = contender.decode(
                question["seconds"], beside_loads=question["beside_loads"], streams=question["streams"]
            )
            return {"tokens_per_s": rate, "loads": loads}
    raise ValueError(f"nobody knows how to {question['do']}")


def _make(argument: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    contender = make_contender(argument)
    return {}, lambda question: answer(contender, question)


if __name__ == "__main__":
    serve_parent(_make)
