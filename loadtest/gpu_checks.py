"""What must hold on a GPU before anything is measured: kernels, graphs, pipelined steps, and transformers' own answers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loadtest import gpu_attention_checks, gpu_row_checks
from services.worker.engine import Engine, EngineConfig, Sampling, SequenceRequest
from services.worker.engine.cuda.decoder import CudaDecoder
from services.worker.engine.kv_cache import KVPool
from services.worker.engine.packing import PackedTokens, Span
from tests.unit.worker.engine.builders import (
    VOCAB_SIZE,
    make_request,
    oracle_greedy,
    run_all,
    save_model,
    tiny_config,
)
from tests.unit.worker.engine.family_configs import TYPES, VARIANTS

ANSWER_TOKENS = 24


def list_checks(device: torch.device, model: str) -> list[tuple[str, Callable[[], object]]]:
    """Each raises when it does not hold. model: "engine" checks everything, "gptj" what GPT-J is made of."""
    sizes = (256,) if model == "gptj" else (64, 80, 96, 128, 256)
    types = ("gptj", "codegen") if model == "gptj" else ("llama", *TYPES)
    kernels: list[tuple[str, Callable[[], object]]] = [
        (
            f"attention kernels, head size {size}",
            partial(gpu_attention_checks.check_head_dim, size, device),
        )
        for size in sizes
    ]
    greedy: list[tuple[str, Callable[[], object]]] = [
        (f"greedy fp32 as transformers: {name}", partial(check_greedy, name, device)) for name in types
    ]
    return [
        *kernels,
        ("kernels between products", lambda: gpu_row_checks.check_all(device)),
        ("graphs as without graphs", lambda: check_graphs(device)),
        ("steps ahead as one at a time", lambda: check_steps_ahead(device)),
        *greedy,
    ]


def _config(name: str) -> Any:
    return tiny_config() if name == "llama" else VARIANTS[name]


def _engine(folder: Path, device: torch.device, **changes: Any) -> Engine:
    values: dict[str, Any] = {
        "device": str(device),
        "precision": "fp32",
        "max_batch": 8,
        "max_context_tokens": 256,
        "kv_tokens": 2048,
        "prefill_chunk_tokens": 32,
        "kernels": "native",
    }
    engine = Engine(EngineConfig(**{**values, **changes}))
    engine.load_model("m", folder)
    return engine


def _requests(sampling: Sampling) -> list[SequenceRequest]:
    rng = random.Random(0)
    return [
        make_request(
            f"s{length}",
            [rng.randrange(3, VOCAB_SIZE) for _ in range(length)],
            ANSWER_TOKENS,
            sampling=sampling,
        )
        for length in (1, 5, 16, 17, 50, 90)
    ]


def check_greedy(name: str, device: torch.device) -> None:
    """Ragged prompts together, in chunks, against `generate` one by one."""
    requests = _requests(Sampling(temperature=0.0))
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        module = save_model(folder, _config(name))
        expected = {
            each.sequence_id: oracle_greedy(module, each.prompt_tokens, ANSWER_TOKENS) for each in requests
        }
        answers = run_all(_engine(folder, device), requests)
    for sequence_id, tokens in expected.items():
        if answers[sequence_id].tokens != tokens:
            raise AssertionError(f"{name}, {sequence_id}: {answers[sequence_id].tokens} instead of {tokens}")


def check_graphs(device: torch.device) -> None:
    """The same kernels on the same numbers: equal bits, at every size of batch, with rows of padding or without."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_model(folder, tiny_config())
        engine = _engine(folder, device)
    decoder = engine._models["m"].decoder
    assert isinstance(decoder, CudaDecoder)
    pool = engine._pool
    assert isinstance(pool, KVPool)
    with torch.inference_mode():
        for rows in range(1, 9):
            spans = tuple(Span([1 + 4 * row, 2 + 4 * row, 3 + 4 * row], 7 * row, 1) for row in range(rows))
            batch = PackedTokens([20 + row for row in range(rows)], spans)
            eager = decoder.logits(decoder.forward_eager(batch, pool)).clone()
            graphed = decoder.logits(decoder.forward(batch, pool))
            # Products are of another height in a graph with padding: cuBLAS may then sum in another order.
            torch.testing.assert_close(graphed, eager, rtol=1e-5, atol=1e-5)


def check_steps_ahead(device: torch.device) -> None:
    knobs = (
        Sampling(temperature=0.0),
        Sampling(temperature=0.9, top_p=0.9, seed=3),
        Sampling(temperature=1.1, top_k=20, repetition_penalty=1.2, seed=4),
    )
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_model(folder, tiny_config())
        for sampling in knobs:
            found = [
                {
                    key: (answer.tokens, answer.text, answer.finish_reason)
                    for key, answer in run_all(
                        _engine(folder, device, steps_ahead=steps), _requests(sampling)
                    ).items()
                }
                for steps in (0, 1)
            ]
            if found[0] != found[1]:
                raise AssertionError(f"{sampling}: answers differ")
