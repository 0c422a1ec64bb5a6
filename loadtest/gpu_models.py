"""Models of real shapes with random weights made on the device, as our engine and as transformers hold them.

Both sides of `loadtest.gpu_engine` share one copy: transformers' parameters are views of our arena. So the device has room
for the KV memory of both, and their answers can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPTJConfig, LlamaConfig, PretrainedConfig

from services.worker.engine.cuda.arena import Arena
from services.worker.engine.decoder_weights import LayerWeights, LinearWeights, NormWeights
from services.worker.engine.spec import DecoderSpec, spec_from_config

# As wide as transformers initializes, so that no sum of random numbers grows without bound.
_SPREAD = 0.02
# A token that random weights never favour over a greedy answer's own: nothing ends early.
_PAD_TOKEN = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    name: str
    config: PretrainedConfig

    @property
    def spec(self) -> DecoderSpec:
        return spec_from_config(self.config.to_dict(), {})


def llama_8b() -> ModelShape:
    return ModelShape(
        "Llama-8B",
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
        ),
    )


def gptj_6b() -> ModelShape:
    return ModelShape("GPT-J-6B", GPTJConfig(eos_token_id=None, bos_token_id=None))


class RandomWeights:
    """See `DecoderWeights`: each tensor is made on the device when it is asked for, by the generator's order."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)
        hidden = spec.hidden_size
        self.embedding = self._random(spec.vocab_size, hidden)
        self.position_table = self._random(spec.max_positions, hidden) if spec.position == "learned" else None
        self.embedding_norm = self._norm() if spec.has_embedding_norm else None
        self.final_norm = self._norm()
        weight = self.embedding if spec.tied_embeddings else self._random(spec.vocab_size, hidden)
        self.head = LinearWeights(weight, self._random(spec.vocab_size) if spec.head_bias else None)

    def layer(self, index: int) -> LayerWeights:
        spec = self._spec
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        inner = spec.intermediate_size * (2 if spec.is_gated else 1)
        return LayerWeights(
            attention_norm=self._norm(),
            qkv=self._linear(query_size + 2 * kv_size, spec.hidden_size, spec.qkv_bias),
            query_norm=self._random(spec.head_dim).add_(1) if spec.qk_norm else None,
            key_norm=self._random(spec.head_dim).add_(1) if spec.qk_norm else None,
            attention_output=self._linear(spec.hidden_size, query_size, spec.output_bias),
            mlp_norm=None if spec.residual == "parallel" else self._norm(),
            mlp_in=self._linear(inner, spec.hidden_size, spec.mlp_bias),
            mlp_out=self._linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias),
        )

    def _linear(self, outputs: int, inputs: int, has_bias: bool) -> LinearWeights:
        return LinearWeights(self._random(outputs, inputs), self._random(outputs) if has_bias else None)

    def _norm(self) -> NormWeights:
        size = self._spec.hidden_size
        return NormWeights(
            self._random(size).add_(1), self._random(size) if self._spec.norm == "layer" else None
        )

    def _random(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(std=_SPREAD, generator=self._generator)


def transformers_module(shape: ModelShape, arena: Arena, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own module on the arena's weights. For a moment it has parameters of its own."""
    with device:
        module = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    module = module.to(device=device, dtype=dtype).eval()
    places = (
        _llama_places(arena, shape.spec)
        if shape.config.model_type == "llama"
        else _gptj_places(arena, shape.spec)
    )
    for name, parameter in list(module.named_parameters()):
        view = places.pop(name)
        if view.shape != parameter.shape:
            raise ValueError(
                f"{name}: {tuple(view.shape)} in the arena, {tuple(parameter.shape)} in transformers"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))
    if places:
        raise ValueError(f"transformers has no {next(iter(places))}")
    module.generation_config = GenerationConfig(do_sample=False, pad_token_id=_PAD_TOKEN)
    return module


def _llama_places(arena: Arena, spec: DecoderSpec) -> dict[str, torch.Tensor]:
    places = {
        "model.embed_tokens.weight": arena.view("embedding"),
        "model.norm.weight": arena.view("final_norm.weight"),
        "lm_head.weight": arena.view("head.weight"),
    }
    query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for index in range(spec.layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        parts = arena.view(ours + "first.weight").split((query_size, kv_size, kv_size))
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            places[f"{theirs}self_attn.{name}.weight"] = part
        gate, up = arena.view(ours + "mlp_in.weight").chunk(2)
        places[theirs + "mlp.gate_proj.weight"], places[theirs + "mlp.up_proj.weight"] = gate, up
        places[theirs + "self_attn.o_proj.weight"] = arena.view(ours + "attention_output.weight")
        places[theirs + "mlp.down_proj.weight"] = arena.view(ours + "mlp_out.weight")
        places[theirs + "input_layernorm.weight"] = arena.view(ours + "attention_norm.weight")
        places[theirs + "post_attention_layernorm.weight"] = arena.view(ours + "mlp_norm.weight")
    return places


def _gptj_places(arena: Arena, spec: DecoderSpec) -> dict[str, torch.Tensor]:
    places = {
        "transformer.wte.weight": arena.view("embedding"),
        "transformer.ln_f.weight": arena.view("final_norm.weight"),
        "transformer.ln_f.bias": arena.view("final_norm.bias"),
        "lm_head.weight": arena.view("head.weight"),
        "lm_head.bias": arena.view("head.bias"),
    }
    hidden, inner = spec.hidden_size, spec.intermediate_size
    for index in range(spec.layers):
        ours, theirs = f"layers.{index}.", f"transformer.h.{index}."
        parts = arena.view(ours + "first.weight").split((hidden, hidden, hidden, inner))
        names = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")
        for name, part in zip(names, parts, strict=True):
            places[f"{theirs}{name}.weight"] = part
        places[theirs + "mlp.fc_in.bias"] = arena.view(ours + "first.bias")[3 * hidden :]
        places[theirs + "attn.out_proj.weight"] = arena.view(ours + "attention_output.weight")
        for name in ("weight", "bias"):
            places[f"{theirs}mlp.fc_out.{name}"] = arena.view(f"{ours}mlp_out.{name}")
            places[f"{theirs}ln_1.{name}"] = arena.view(f"{ours}attention_norm.{name}")
    return places
