"""Trains the demo's two LoRA adapters: `python -m infra.demo.train_adapters BASE_FOLDER [OUT_FOLDER]`.

Reads infra/demo/text/<name>.jsonl (one {"prompt", "answer"} per line) and writes <name>/adapter_config.json and
adapter_model.safetensors in PEFT's format. Run by hand when a text changes; set-up only merges what is committed. One CPU
thread and a fixed seed: the same text on the same torch build gives the same bytes. Takes about three minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM

DEMO_FOLDER = Path(__file__).parent
PERSONAS = ("pirate", "formal")
TARGET_MODULES = ("q_proj", "v_proj")
RANK = 8
ALPHA = 16
SEED = 20260101
EPOCHS = 4
BATCH_EXAMPLES = 4
# Far too high for a full fine-tune, usual for a LoRA this small.
PEAK_LEARNING_RATE = 2e-3
WARMUP_FRACTION = 0.1
IGNORED_LABEL = -100


class LoraUpdate:
    """Adds scale * B @ A to a frozen linear layer's output, as its forward hook.

    Both are fp32: lora_a (rank, in), lora_b (out, rank). B starts at zero, so training starts at the base.
    """

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        self.lora_a = torch.randn(RANK, base.in_features, generator=generator) / base.in_features**0.5
        self.lora_b = torch.zeros(base.out_features, RANK)
        self.lora_a.requires_grad_()
        self.lora_b.requires_grad_()

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        update = nn.functional.linear(nn.functional.linear(inputs[0], self.lora_a), self.lora_b)
        return output + update * (ALPHA / RANK)


@dataclass(frozen=True, slots=True)
class Example:
    token_ids: list[int]
    # Only what the model itself would say counts in the loss: the answer and its end token.
    prompt_tokens: int


def load_examples(base: Path, text: Path) -> list[Example]:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    source = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = ImmutableSandboxedEnvironment().from_string(source["chat_template"])
    examples = []
    for line in text.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = template.render(
            messages=[{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
        )
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        answer_ids = tokenizer.encode(row["answer"] + source["eos_token"], add_special_tokens=False).ids
        examples.append(Example(prompt_ids + answer_ids, len(prompt_ids)))
    return examples


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each (batch, longest) int64, padded on the right."""
    shape = (len(examples), max(len(example.token_ids) for example in examples))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        ids[row, :length] = torch.tensor(example.token_ids)
        mask[row, :length] = 1
        labels[row, example.prompt_tokens : length] = ids[row, example.prompt_tokens : length]
    return ids, mask, labels


def add_adapters(model: LlamaForCausalLM) -> dict[str, LoraUpdate]:
    """Freeze the model and put an update on each target; returns them by the module's full name."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    adapters: dict[str, LoraUpdate] = {}
    for index, layer in enumerate(model.model.layers):
        for name in TARGET_MODULES:
            projection = getattr(layer.self_attn, name)
            update = LoraUpdate(projection, generator)
            projection.register_forward_hook(update)
            adapters[f"model.layers.{index}.self_attn.{name}"] = update
    return adapters


def train(base: Path, examples: list[Example]) -> dict[str, LoraUpdate]:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    adapters = add_adapters(model)
    parameters = [tensor for update in adapters.values() for tensor in (update.lora_a, update.lora_b)]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    steps_per_epoch = -(-len(examples) // BATCH_EXAMPLES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch, pct_start=WARMUP_FRACTION
    )
    order = torch.Generator().manual_seed(SEED)
    started = time.monotonic()
    for epoch in range(EPOCHS):
        shuffled = [examples[i] for i in torch.randperm(len(examples), generator=order).tolist()]
        losses = []
        for start in range(0, len(shuffled), BATCH_EXAMPLES):
            ids, mask, labels = collate(shuffled[start : start + BATCH_EXAMPLES])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return adapters


def save_adapter(adapters: dict[str, LoraUpdate], folder: Path, base_name: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.lora_a.detach().to(torch.bfloat16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.lora_b.detach().to(torch.bfloat16)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(TARGET_MODULES),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # The writer leaves it readable by its owner alone; a clone must be readable by whoever runs it.
    weights.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's LoRA adapters.")
    parser.add_argument("base", type=Path, help="folder of the converted smollm2-135m-instruct")
    parser.add_argument("out", type=Path, nargs="?", default=DEMO_FOLDER / "adapters")
    arguments = parser.parse_args()
    # More threads change the order of sums, and with it the bytes.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for persona in PERSONAS:
        examples = load_examples(arguments.base, DEMO_FOLDER / "text" / f"{persona}.jsonl")
        print(f"{persona}: {len(examples)} examples")
        save_adapter(train(arguments.base, examples), arguments.out / persona, "smollm2-135m-instruct")


if __name__ == "__main__":
    main()
