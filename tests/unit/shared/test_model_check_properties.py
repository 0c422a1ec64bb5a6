"""Whatever a stranger writes into a model folder, the check ends in a manifest or in a refusal, never in another error."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.model_config import ModelTypeError
from shared.model_folder import ModelFolderError, ModelFolderLimits, inspect_model_folder
from shared.model_type import ARCHITECTURES, describe_model_type
from shared.safetensors_header import SafetensorsError, parse_safetensors_header
from tests.model_folders import make_config, make_folder, make_tensors, safetensors_bytes

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = sorted(
    {
        *make_config(),
        *(
            "head_dim",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "attention_bias",
        ),
        *("n_embd", "n_head", "n_inner", "rotary_dim", "rotary_pct", "ffn_dim", "activation_function"),
        *("word_embed_proj_dim", "use_parallel_residual", "seq_length", "enable_bias"),
        *("mlp_bias", "rope_scaling", "rope_parameters", "partial_rotary_factor", "pretraining_tp"),
    }
)
ROPE = st.dictionaries(
    st.sampled_from(
        ["type", "rope_type", "rope_theta", "factor", "low_freq_factor", "partial_rotary_factor"]
    ),
    ANY_JSON | st.sampled_from(["default", "linear", "llama3"]),
)
HEADER, _, _ = safetensors_bytes(make_tensors(make_config()))[8:].partition(b"\0")


@settings(max_examples=400, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), ANY_JSON | ROPE, max_size=4),
)
def test_any_config_is_described_or_refused(architecture: str, changes: dict[str, Any]) -> None:
    base = make_config(
        architectures=[architecture],
        model_type=ARCHITECTURES[architecture].model_type,
        sliding_window=None,
        use_sliding_window=False,
        head_dim=4,
        rotary_dim=4,
        ffn_dim=16,
    )
    with contextlib.suppress(ModelTypeError):
        described = describe_model_type(base | changes)
        assert len(described.signature) == 16
        assert 1 <= described.context_tokens
        assert all(size >= 1 for shape in described.tensors.values() for size in shape)


@settings(max_examples=400, deadline=None)
@given(document=st.dictionaries(st.text(max_size=4), ANY_JSON, max_size=3), size=st.integers(0, 2**41))
def test_any_header_is_parsed_or_refused(document: dict[str, Any], size: int) -> None:
    with contextlib.suppress(SafetensorsError):
        parse_safetensors_header(json.dumps(document).encode(), size)


@settings(max_examples=400, deadline=None)
@given(position=st.integers(0, len(HEADER) - 1), value=st.integers(0, 255))
def test_header_with_one_byte_changed_is_sound_or_refused(position: int, value: int) -> None:
    changed = bytearray(HEADER)
    changed[position] = value
    file_bytes = len(safetensors_bytes(make_tensors(make_config())))

    with contextlib.suppress(SafetensorsError):
        header = parse_safetensors_header(bytes(changed), file_bytes)
        ranges = sorted((tensor.begin, tensor.end) for tensor in header.tensors.values())
        assert ranges[0][0] == 8 + len(HEADER)
        assert ranges[-1][1] == file_bytes
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "vocab.json"]
    ),
    cut=st.floats(0, 1),
    junk=st.binary(max_size=40),
)
def test_folder_with_one_file_spoilt_is_described_or_refused(name: str, cut: float, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = make_folder(Path(parent) / "model")
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(content[: int(len(content) * cut)] + junk)

        with contextlib.suppress(ModelFolderError):
            inspect_model_folder(folder, ModelFolderLimits())
