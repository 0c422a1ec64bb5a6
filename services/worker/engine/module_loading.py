"""Makes a `ModuleDecoder` of a model folder: transformers loads it, without code or weights from anywhere else.

A module is taken only when it proves, on a few tokens, that keys and values in our pool are all of its state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .api import ModelRefusal
from .config_file import Config, positive, token_ids
from .decoder import kv_dtype
from .kv_cache import KVPool
from .module_decoder import KVLayout, ModuleDecoder, ModuleRunner, ModuleSpec
from .packing import PackedTokens, Span

# transformers exchanges functions of torch while it builds a module.
_LOAD_LOCK = threading.Lock()
# What would fetch or run code, or read weights of another place; refused at any depth of the config.
_REFUSED_KEYS = frozenset(
    {"auto_map", "transformers_weights", "quantization_config", "experts_implementation"}
)
_POSITION_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")
# Some types know no end to their positions.
_DEFAULT_POSITIONS = 2048
_PROBE_TOKENS = 12
_PROBE_PIECES = (7, 1, 4)
# Mean absolute error of the pieces' logits over the spread of the whole's: rounding is far below, a lost state far above.
_MOST_PROBE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def load_module(
    folder: Path, config: Config, generation: Config, precision: str, device: torch.device
) -> ModuleDecoder:
    """config, generation: as read from the folder. Seconds to minutes; holds fp32 weights for a while.

    int8 keeps such a model in bf16. Raises ModelRefusal.
    """
    refused = sorted(_set_keys(config) & _REFUSED_KEYS)
    if refused:
        raise ModelRefusal(f"config.json: {refused[0]} is not served")
    if (folder / "adapter_config.json").exists():
        raise ModelRefusal("adapter_config.json: an adapter is not a model of its own")
    dtype = kv_dtype(precision)
    with _LOAD_LOCK:
        module = _load_by_transformers(folder, dtype)
    text_config = module.config.get_text_config(decoder=True)
    runner = ModuleRunner(module.to(device), device)
    tokens = _probe_tokens(module)
    with torch.inference_mode():
        layout, whole, hidden_size = _probe(runner, tokens)
    spec = ModuleSpec(
        model_type=str(config["model_type"]),
        vocab_size=whole.shape[-1],
        hidden_size=hidden_size,
        max_positions=_max_positions(text_config.to_dict()),
        eos_token_ids=token_ids(generation.get("eos_token_id")) or token_ids(text_config.eos_token_id),
        kv_shape=layout.kv_shape,
    )
    decoder = ModuleDecoder(spec, runner, layout)
    with torch.inference_mode():
        _check_pieces(decoder, tokens, whole, dtype, device)
    return decoder


def _set_keys(value: object) -> set[str]:
    """Of all objects inside a JSON value: keys that say something. Its depth is bounded by the parser's own."""
    if isinstance(value, Mapping):
        inner = (_set_keys(each) for each in value.values())
        return set().union({str(key) for key, each in value.items() if each is not None}, *inner)
    if isinstance(value, list):
        return set().union(*(_set_keys(each) for each in value))
    return set()


def _load_by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """In fp32 and narrowed afterwards: to build in another dtype, transformers changes torch's default for all threads."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **common)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelRefusal(f"config.json: model_type {config.model_type!r} has an encoder; not served")
        module, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            # Named, so that no config can ask for a kernel from elsewhere.
            attn_implementation="eager",
            output_loading_info=True,
            **common,
        )
    except ModelRefusal:
        raise
    except Exception as problem:
        raise ModelRefusal(f"transformers cannot load {folder.name}: {problem}") from problem
    for kind, names in notes.items():
        if names:
            raise ModelRefusal(f"safetensors: {kind}: {len(names)}, such as {min(map(str, names))}")
    if module.get_output_embeddings() is None:
        raise ModelRefusal(f"transformers' {type(module).__name__} has no output head")
    # Parameters only: tables of angles stay as fine as they are, and what the class wants in fp32 stays so.
    kept = _kept_in_fp32(module, dtype)
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.float32 and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    return module.eval().requires_grad_(False)


def _kept_in_fp32(module: Any, dtype: torch.dtype) -> set[str]:
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names


def _max_positions(config: Mapping[str, Any]) -> int:
    """1. Frequencies that follow the longest sequence seen would let a neighbour change an answer: refused.
    2. Frequencies that switch at a length would turn cached keys differently from new ones: served up to that length.
    """
    positions = positive(config, _POSITION_KEYS, _DEFAULT_POSITIONS)
    for settings in _rope_settings(config):
        kind = settings.get("rope_type", settings.get("type"))
        if kind == "dynamic":
            raise ModelRefusal("config.json: rope type 'dynamic' is not served")
        if kind == "longrope":
            switch = settings.get("original_max_position_embeddings") or config.get(
                "original_max_position_embeddings"
            )
            positions = min(positions, positive({"": switch}, ("",), positions))
    return positions


def _rope_settings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        if "rope_type" in value or "type" in value:
            yield value
        for inner in value.values():
            yield from _rope_settings(inner)


def _probe_tokens(module: Any) -> list[int]:
    vocabulary = module.get_input_embeddings().weight.shape[0]
    return [(7 * index + 3) % vocabulary for index in range(_PROBE_TOKENS)]


def _probe(runner: ModuleRunner, tokens: Sequence[int]) -> tuple[KVLayout, torch.Tensor, int]:
    """The cache's layout, the logits of all tokens at once, and the width of what the head reads."""
    cache = runner.empty_cache()
    try:
        states, logits = runner.run(torch.tensor(tokens, device=runner.device), 0, cache)
    except RuntimeError as problem:
        raise ModelRefusal(str(problem)) from problem
    layouts = {_layout_of(layer, len(tokens)) for layer in cache.layers}
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None:
        raise ModelRefusal(
            "this model type's state is not a key and a value for each token, alike in all layers"
        )
    kv_heads, key_dim, value_dim, dtype = layout
    return KVLayout(len(cache.layers), kv_heads, key_dim, value_dim, dtype), logits, states.shape[-1]


def _layout_of(layer: Any, tokens: int) -> tuple[int, int, int, torch.dtype] | None:
    """layer: of the module's cache, after `tokens` tokens of one sequence."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
        return None
    if keys.shape[:3] != values.shape[:3] or keys.shape[0] != 1 or keys.shape[2] != tokens:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3], keys.dtype


def _check_pieces(
    decoder: ModuleDecoder,
    tokens: Sequence[int],
    whole: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """In pieces through a pool, the same tokens must give the same logits; a look ahead or a state elsewhere shows."""
    pool = KVPool(decoder.spec.kv_shape, 1, dtype, device)
    rows = []
    start = 0
    try:
        for count in _PROBE_PIECES:
            batch = PackedTokens(tokens[start : start + count], [Span([1], start, count)])
            rows.append(decoder.logits(decoder.forward(batch, pool)))
            start += count
    except RuntimeError as problem:
        raise ModelRefusal(str(problem)) from problem
    error = (torch.cat(rows) - whole.float()).abs().mean() / whole.float().std().clamp_min(1e-6)
    if not error.item() <= _MOST_PROBE_ERROR[dtype]:
        raise ModelRefusal("this model type does not give the same answer when its tokens come in pieces")
