"""Tiny models with random weights and a small real tokenizer, and shorthand to run the engine to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from services.worker.engine import Engine, EngineConfig, Sampling, SequenceRequest, TokenLogprob

SENTENCES = (
    "The river carried the small boat past the mill, and nobody on the bank looked up.",
    "Grüße aus Köln: die Straße ist naß, der Käse ist alt.",
    "猫は窓のそばで眠っている。雨が降っている。",
    "Emoji 😀😃😄 and family 👨‍👩‍👧‍👦 and flags 🇩🇪🇯🇵.",
    "user: How many? assistant: Three, and then one more.",
)
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")
EOS = 0
VOCAB_SIZE = 384
GREEDY = Sampling(temperature=0.0)


def save_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE, so small that most characters beyond ASCII span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def tiny_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    return LlamaConfig(**{**values, **changes})


def save_model(folder: Path, config: PretrainedConfig, seed: int = 0, scale: float = 8.0) -> Any:
    """Returns transformers' module. scale: widens random weights until answers depend on the whole context."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name or ".ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(scale)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_poisoned(folder: Path, source: Path, token: int) -> None:
    """The tiny model again, but whose embedding of `token` is NaN: who reads it has no finite logits any more."""
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    embedding = head.clone()
    embedding[token] = float("nan")
    save_file(
        {**tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": head},
        folder / "model.safetensors",
    )
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def make_engine(folder: Path, handle: str = "m", **changes: Any) -> Engine:
    values: dict[str, Any] = {
        "precision": "fp32",
        "max_batch": 8,
        "max_context_tokens": 256,
        "kv_tokens": 2048,
    }
    engine = Engine(EngineConfig(**{**values, **changes}))
    engine.load_model(handle, folder)
    return engine


def make_request(
    sequence_id: str, prompt_tokens: Sequence[int], max_tokens: int = 12, **changes: Any
) -> SequenceRequest:
    values: dict[str, Any] = {"model": "m", "isolation_key": "team", "sampling": GREEDY}
    return SequenceRequest(
        sequence_id=sequence_id, prompt_tokens=prompt_tokens, max_tokens=max_tokens, **{**values, **changes}
    )


@dataclass
class Answer:
    """All deltas of one sequence put together, with their order and indices checked."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    error: str | None = None


def run_all(
    engine: Engine,
    requests: Iterable[SequenceRequest] = (),
    before_step: Callable[[int], None] = lambda step: None,
    most_steps: int = 2000,
) -> dict[str, Answer]:
    """Adds the requests and steps until nothing is left; `before_step` may add or cancel more."""
    answers: dict[str, Answer] = {}
    starts: dict[str, int] = {}
    for request in requests:
        engine.add(request)
    for step in range(most_steps):
        before_step(step)
        if not engine.has_work:
            return answers
        for delta in engine.step().deltas:
            answer = answers.setdefault(delta.sequence_id, Answer())
            start = starts.setdefault(delta.sequence_id, delta.token_start)
            assert answer.finish_reason is None and answer.error is None, "a delta after the end"
            assert delta.token_start == start + len(answer.tokens), "a gap or a double in the token indices"
            answer.tokens += delta.tokens
            answer.text += delta.text
            answer.pieces.append(delta.text)
            answer.logprobs += delta.logprobs
            answer.prompt_logprobs += delta.prompt_logprobs
            answer.finish_reason, answer.error = delta.finish_reason, delta.error
    raise AssertionError(f"not done after {most_steps} steps")


def oracle_greedy(model: Any, prompt_tokens: Sequence[int], max_tokens: int) -> list[int]:
    """transformers' own greedy answer, its end token included."""
    prompt = torch.tensor([list(prompt_tokens)])
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    answer: list[int] = output[0, prompt.shape[1] :].tolist()
    return answer


def save_varied_model(
    folder: Path,
    config: PretrainedConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    scale: float = 12.0,
) -> tuple[Any, list[list[int]]]:
    """transformers' module, and its greedy answers to the prompts.

    Seeds are tried until an answer has 5 different tokens on the average: one token repeated would prove nothing.
    """
    for seed in range(24):
        oracle = save_model(folder, config, seed, scale)
        expected = [oracle_greedy(oracle, prompt, max_tokens) for prompt in prompts]
        if sum(len(set(answer)) for answer in expected) >= 5 * len(expected):
            return oracle, expected
    raise AssertionError("no seed gives answers that would prove anything")
