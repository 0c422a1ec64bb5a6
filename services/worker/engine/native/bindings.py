"""The structs of `kernels.h` as ctypes sees them. Change both together: `declare` compares their sizes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import torch

_FLOATS = c_void_p


class Kind(IntEnum):
    FP32 = 0
    BF16 = 1
    INT8 = 2


class Norm(Structure):
    _fields_ = [("weight", _FLOATS), ("bias", _FLOATS)]


class Linear(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("true_inputs", c_int32),
        ("packed", c_void_p),
        ("scales", _FLOATS),
        ("bias", _FLOATS),
        ("sums", c_void_p),
    ]


class Lora(Structure):
    _fields_ = [
        ("rank", c_int32),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("down", _FLOATS),
        ("up", _FLOATS),
    ]


class Adapter(Structure):
    _fields_ = [("products", POINTER(Lora))]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("query_norm", _FLOATS),
        ("key_norm", _FLOATS),
        ("qkv", Linear),
        ("attention_output", Linear),
        ("mlp_in", Linear),
        ("mlp_out", Linear),
    ]


class Decoder(Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("layer_count", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim"),
                *("norm_kind", "activation", "is_gated", "residual", "rotary_dim", "is_interleaved"),
                *("kind", "kv_kind"),
            )
        ),
        ("norm_eps", c_float),
        ("score_scale", c_float),
        ("cos", _FLOATS),
        ("sin", _FLOATS),
        ("slopes", _FLOATS),
        ("layers", POINTER(Layer)),
        ("final_norm", Norm),
        ("head", Linear),
    ]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("scales", _FLOATS), ("offsets", c_void_p), ("plain", _FLOATS)]


class Pass(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("threads", c_int32),
        ("positions", c_void_p),
        ("table_starts", c_void_p),
        ("tables", c_void_p),
        ("adapters", c_void_p),
        ("pool", c_void_p),
        ("pool_blocks", c_int64),
        ("hidden", _FLOATS),
        ("between", _FLOATS),
        ("input", Rows),
        ("wide", _FLOATS),
        ("mixed", _FLOATS),
        ("row_scratch", _FLOATS),
        ("row_floats", c_int64),
        ("damaged", POINTER(c_int32)),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Raises OSError when the library was made from another `kernels.h` than these structs."""
    library.rh_forward.argtypes = (POINTER(Decoder), POINTER(Pass))
    library.rh_forward.restype = None
    library.rh_logits.argtypes = (POINTER(Decoder), POINTER(Pass), c_void_p)
    library.rh_logits.restype = None
    library.rh_panel_sums.argtypes = (POINTER(Linear), c_void_p)
    library.rh_panel_sums.restype = None
    library.rh_struct_bytes.argtypes = (c_int32,)
    library.rh_struct_bytes.restype = c_int64
    for number, struct in enumerate((Norm, Linear, Lora, Adapter, Layer, Decoder, Rows, Pass)):
        if library.rh_struct_bytes(number) != ctypes.sizeof(struct):
            raise OSError(
                f"the library's {struct.__name__} has another size: the files changed since the start"
            )


def address(tensor: torch.Tensor | None) -> int | None:
    """Of the first element; None is C's NULL. Whoever passes it keeps the tensor alive, and contiguous."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    pointer: int = tensor.data_ptr()
    return pointer
