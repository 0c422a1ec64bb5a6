"""`CudaDecoder` without graphs against `TorchDecoder`. Run by `test_decoder.py` under the interpreter.

One layer of the smallest shapes: the interpreter takes about a millisecond for each program of a kernel.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch

from services.worker.engine.cuda.decoder import CudaDecoder
from services.worker.engine.family_weights import FamilyWeights
from services.worker.engine.kv_cache import KVPool
from services.worker.engine.lora import LoraAdapter, LowRank, PreparedAdapter, Product
from services.worker.engine.packing import PackedTokens, Span
from services.worker.engine.spec import DecoderSpec, spec_from_config
from services.worker.engine.torch_decoder import TorchDecoder
from services.worker.engine.weights import Checkpoint
from tests.unit.worker.engine.builders import VOCAB_SIZE, save_model
from tests.unit.worker.engine.family_configs import VARIANTS

CPU = torch.device("cpu")
TOLERANCE = 2e-5


def adapter_of(spec: DecoderSpec) -> LoraAdapter:
    """Rank 2 on each product."""
    generator = torch.Generator().manual_seed(2)
    query_size, inner = spec.heads * spec.head_dim, spec.intermediate_size
    shapes: dict[Product, tuple[int, int]] = {
        "qkv": (query_size + 2 * spec.kv_heads * spec.head_dim, spec.hidden_size),
        "attention_output": (spec.hidden_size, query_size),
        "mlp_in": (inner * (2 if spec.is_gated else 1), spec.hidden_size),
        "mlp_out": (spec.hidden_size, inner),
    }

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    layer = {
        name: LowRank(random(2, inputs), random(outputs, 2)) for name, (outputs, inputs) in shapes.items()
    }
    return LoraAdapter("adapter", (layer,) * spec.layers)


def passes(tokens: list[int], adapter: PreparedAdapter) -> list[PackedTokens]:
    """A prompt; a mixed pass that goes on with it beside a new one's with an adapter; a decoding pass with a token drawn
    before.
    """
    first, second = [3], [2]
    drawn = torch.tensor([9, tokens[23]])
    return [
        PackedTokens(tokens[:4], (Span(first, 0, 4),)),
        PackedTokens(tokens[4:8], (Span(first, 4, 1), Span(first, 5, 2), Span(second, 0, 1, adapter))),
        PackedTokens([tokens[8], -2], (Span(first, 7, 1), Span(second, 1, 1, adapter)), drawn),
    ]


def outputs(decoder: TorchDecoder | CudaDecoder, spec: DecoderSpec) -> list[torch.Tensor]:
    tokens = torch.randint(3, VOCAB_SIZE, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    pool = KVPool(spec.kv_shape, 4, torch.float32, CPU)
    found: list[torch.Tensor] = []
    for batch in passes(tokens, decoder.prepare_adapter(adapter_of(spec))):
        hidden = decoder.forward(batch, pool).clone()
        found += [decoder.logits(hidden), decoder.final_hidden(hidden)]
    return [*found, *(memory for layer in range(spec.layers) for memory in pool.layer(layer))]


def check(name: str) -> None:
    config = copy.deepcopy(VARIANTS[name])
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_model(folder, config, scale=2.0)
        spec = spec_from_config(config.to_dict(), {})
        assert spec.layers == 1
        with Checkpoint(folder) as checkpoint:
            reference = TorchDecoder(spec, FamilyWeights(spec, checkpoint), "fp32", CPU)
        with Checkpoint(folder) as checkpoint:
            decoder = CudaDecoder(spec, "fp32", CPU, 8, 64)
            decoder.arena.fill(FamilyWeights(spec, checkpoint))
    pairs = zip(outputs(decoder, spec), outputs(reference, spec), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        difference = (ours.float() - theirs.float()).abs().max().item()
        bound = TOLERANCE * max(1.0, theirs.abs().max().item())
        assert difference < bound, (name, index, difference)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name in names:
            check(name)
    print(f"checked {len(names)} types")


if __name__ == "__main__":
    main(sys.argv[1:])
