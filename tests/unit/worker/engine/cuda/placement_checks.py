"""Under Triton's interpreter: two models that stand in one slot in turn each answer as plain torch does."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from services.worker.engine.api import EngineConfig
from services.worker.engine.cuda.placement import Placement
from services.worker.engine.images.canary import sing
from services.worker.engine.images.convert import convert
from services.worker.engine.images.model_image import open_model_image
from tests.unit.worker.engine.builders import save_model, tiny_config
from tests.unit.worker.engine.cuda.decoder_checks import CPU

CONFIG = EngineConfig(
    device="cuda", precision="fp32", max_batch=8, max_context_tokens=64, host_image_bytes=10**9
)


def check(folder: Path) -> None:
    # As on a machine with a device, but that the slot is in host memory.
    placement = Placement(CONFIG, CPU)
    decoder = None
    for seed in (0, 1):
        model, image = folder / f"model{seed}", folder / f"{seed}.image"
        save_model(model, tiny_config(num_hidden_layers=1), seed)
        convert(model, image, f"key{seed}", CONFIG)
        found = open_model_image(image, f"key{seed}", 64)
        placed = placement.load(found, lambda _: None)
        assert decoder is None or placed is decoder, "the slot that was left is taken again"
        decoder = placed
        # Plain torch sang it when the image was made: the kernels say the same.
        assert not found.canary.differs_from(sing(placed, "fp32", CPU), is_exact=False)
        placement.leave(placed)
    other = open_model_image(folder / "1.image", "key1", 64)
    first = open_model_image(folder / "0.image", "key0", 64)
    assert first.canary.differs_from(other.canary, is_exact=False), "the canaries tell the models apart"


def main(_names: list[str]) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    print("checked 1 types")


if __name__ == "__main__":
    main(sys.argv[1:])
