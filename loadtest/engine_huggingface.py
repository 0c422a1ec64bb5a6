"""transformers as a side of `loadtest.engine`: `generate` in static batches, and its continuous batching. Runs in a child
process.

Greedy, without any logits processor: no end-of-sequence token is set, which costs less than to forbid one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import BaseStreamer, ContinuousBatchingConfig

from loadtest.engine_sides import SideSpec
from loadtest.engine_workloads import Request

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAD_TOKEN = 0
# Tokens per CPU second: 31 to 35 with pages of 16 to 256 and batches of 256 to 2048 tokens, this one the best of them; eager
# attention 31 where sdpa had 34; compiled 10, its compilation included.
CONTINUOUS = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 512, "max_requests_per_batch": 16}
POLL_S = 5.0


def load_model(spec: SideSpec) -> Any:
    torch.set_num_threads(spec.threads)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model, dtype=DTYPES[spec.precision], local_files_only=True
    ).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD_TOKEN)
    return model


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes when the first token came; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.puts, self.first_s = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        pass


class StaticBatches:
    def __init__(self, spec: SideSpec) -> None:
        self._model = load_model(spec)

    def run(
        self, requests: list[Request], groups: list[list[int]]
    ) -> tuple[float, float, dict[int, list[int]]]:
        """A batch is padded on the left and computes until its longest answer ends; what it computes beyond an answer's
        length is cut."""
        answers: dict[int, list[int]] = {}
        decode_s = 0.0
        started_s = time.perf_counter()
        for group in groups:
            streamer = FirstToken() if len(group) == 1 else None
            new_tokens = self._generate([requests[index] for index in group], streamer)
            if streamer is not None:
                decode_s += time.perf_counter() - streamer.first_s
            for index, tokens in zip(group, new_tokens, strict=True):
                answers[index] = tokens[: requests[index].answer_tokens]
        return time.perf_counter() - started_s, decode_s, answers

    def _generate(self, batch: list[Request], streamer: FirstToken | None) -> list[list[int]]:
        width = max(len(request.prompt) for request in batch)
        pads = [width - len(request.prompt) for request in batch]
        prompts = torch.tensor(
            [[PAD_TOKEN] * pad + list(request.prompt) for pad, request in zip(pads, batch, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        with torch.inference_mode():
            output = self._model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=max(request.answer_tokens for request in batch),
                streamer=streamer,
            )
        new_tokens: list[list[int]] = output[:, width:].tolist()
        return new_tokens

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        scores = []
        with torch.inference_mode():
            for window in windows:
                logits = self._model(torch.tensor([window])).logits[0, :-1].float()
                wanted = torch.tensor(window[1:])[:, None]
                scores.append(logits.log_softmax(-1).gather(1, wanted)[:, 0].tolist())
        return scores


class ContinuousBatching:
    """What `generate_batch` does, with its manager kept running from one run to the next and a length for each answer."""

    def __init__(self, spec: SideSpec) -> None:
        model = load_model(spec)
        model.generation_config.eos_token_id = -1  # how this part of transformers spells "none"
        self._manager = model.init_continuous_batching(
            generation_config=model.generation_config,
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **CONTINUOUS),
        )
        self._manager.start()
        self._runs = 0

    def run(
        self, requests: list[Request], groups: list[list[int]]
    ) -> tuple[float, float, dict[int, list[int]]]:
        answers: dict[int, list[int]] = {}
        started_s = time.perf_counter()
        for group in groups:
            self._runs += 1
            names = {f"{self._runs}-{index}": index for index in group}
            for name, index in names.items():
                request = requests[index]
                self._manager.add_request(
                    list(request.prompt), request_id=name, max_new_tokens=request.answer_tokens
                )
            waiting = set(names)
            while waiting:
                result = self._manager.get_result(timeout=POLL_S)
                if result is None:
                    if not self._manager.is_running():
                        raise RuntimeError("continuous batching stopped")
                elif result.error is not None:
                    raise RuntimeError(result.error)
                elif result.is_finished():
                    waiting.remove(result.request_id)
                    answers[names[result.request_id]] = list(result.generated_tokens)
        return time.perf_counter() - started_s, 0.0, answers

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError("scored by StaticBatches")
