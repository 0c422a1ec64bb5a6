"""Fine-tunes of one model in a store of their own, as the gateway leaves registered ones, with their images.

A fine-tune is the base with noise in its norms: other answers, the same work. 20 of SmolLM2 and their images are 12 GB;
they are made once, under `.local/bench/hotswap/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra.local.bf16_safetensors import (
    Bf16,
    read_bf16_safetensors,
    to_bf16,
    to_float32,
    write_bf16_safetensors,
)
from loadtest.engine_models import BENCH, BenchModel
from services.worker.engine import EngineConfig
from services.worker.engine.images.convert import convert
from services.worker.image_store import ImageStore
from shared.messages import ModelRef
from shared.model_files import ModelFolderLimits
from shared.model_folder import inspect_model_folder

HOME = BENCH / "hotswap"
NOISE_STD = 0.02
TINY_NOISE_STD = 3.0
"""Small random models repeat the last token, whatever is changed a little."""
_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
IMAGES_LIMIT_BYTES = 1 << 40
_READ_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FineTune:
    """folder: as it was registered. image, key: what `Engine.load_image` takes."""

    ref: ModelRef
    folder: Path
    image: Path
    key: str


@dataclass(frozen=True, slots=True)
class FineTunes:
    """store, images: folders for a worker. weight_bytes: of each model in memory, at most."""

    store: Path
    images: Path
    models: tuple[FineTune, ...]
    weight_bytes: int
    vocab_size: int


def ensure_fine_tunes(
    base: BenchModel, count: int, config: EngineConfig, noise_std: float = NOISE_STD
) -> FineTunes:
    """Raises OSError."""
    weights = read_bf16_safetensors(base.folder / "model.safetensors")
    home = _home_of(base.folder, weights, noise_std)
    models = tuple(
        _ensure_fine_tune(home, base.folder, weights, noise_std, number, config) for number in range(count)
    )
    _remove_strange_images(home, config)
    for model in models:
        if not model.image.exists():
            convert(model.folder, model.image, model.key, config)
    most_bytes = max(model.image.stat().st_size for model in models)
    return FineTunes(home / "store", home / "images", models, most_bytes, base.vocab_size)


def read_into_page_cache(tunes: FineTunes) -> None:
    """Images and folders: afterwards no side waits for the disk, if the memory is enough."""
    for model in tunes.models:
        for path in (model.image, _weights_file(model.folder)):
            with path.open("rb") as file:
                while file.read(_READ_BYTES):
                    pass


def noisy_norms(weights: dict[str, Bf16], noise_std: float, seed: int) -> dict[str, Bf16]:
    """The same tensors, but for vectors: each of their numbers is larger or smaller by some part."""
    rng = np.random.default_rng(seed)
    return {
        name: _noisy(tensor, noise_std, rng) if tensor.ndim == 1 else tensor
        for name, tensor in sorted(weights.items())
    }


def _noisy(tensor: Bf16, noise_std: float, rng: np.random.Generator) -> Bf16:
    factors = 1 + noise_std * rng.standard_normal(tensor.shape, dtype=np.float32)
    return to_bf16(to_float32(tensor) * factors.astype(np.float32))


def _home_of(base: Path, weights: dict[str, Bf16], noise_std: float) -> Path:
    """Named by the base's weights and files: those made of another base leave the disk."""
    digest = hashlib.sha256(str(noise_std).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].tobytes() if weights[name].ndim == 1 else b"")
    for name in _COPIED:
        digest.update((base / name).read_bytes() if (base / name).exists() else b"")
    home = HOME / f"{base.name}-{digest.hexdigest()[:12]}"
    for other in HOME.glob(f"{base.name}-*"):
        if other != home:
            shutil.rmtree(other)
    (home / "store").mkdir(parents=True, exist_ok=True)
    return home


def _ensure_fine_tune(
    home: Path, base: Path, weights: dict[str, Bf16], noise_std: float, number: int, config: EngineConfig
) -> FineTune:
    name = f"mod_{number:02}"
    folder = home / "store" / name / "1"
    if not folder.exists():
        building = home / f".building-{name}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for copied in _COPIED:
            if (base / copied).exists():
                shutil.copyfile(base / copied, building / copied)
        write_bf16_safetensors(_weights_file(building), noisy_norms(weights, noise_std, number))
        manifest = inspect_model_folder(building, ModelFolderLimits())
        (building / "manifest.json").write_text(json.dumps(manifest.to_json()), encoding="utf-8")
        folder.parent.mkdir(parents=True, exist_ok=True)
        building.rename(folder)
    signature = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["signature"]
    ref = ModelRef(model_id=name, revision=1, name=f"bench/{name}", folder=f"{name}/1", signature=signature)
    images = ImageStore(home / "images", IMAGES_LIMIT_BYTES, config)
    key = images.key(ref, folder)
    return FineTune(ref, folder, home / "images" / f"{key}.image", key)


def _remove_strange_images(home: Path, config: EngineConfig) -> None:
    """Of another layout, which nobody asks for any more."""
    images = ImageStore(home / "images", IMAGES_LIMIT_BYTES, config)
    wanted = set()
    for folder in (home / "store").glob("*/1"):
        ref = ModelRef(model_id=folder.parent.name, revision=1, name="", folder="", signature="")
        wanted.add(images.key(ref, folder))
    for image in (home / "images").glob("*.image"):
        if image.stem not in wanted:
            image.unlink()


def _weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"
