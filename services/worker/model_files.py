"""A revision's folder in the model store, as a worker reads it: its manifest, and whether the files are still those."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from shared.messages import WeightsRef
from shared.model_folder import ModelManifest

MANIFEST_FILE = "manifest.json"


class ModelUnavailable(Exception):
    """The model cannot be served by this worker now; the message says why, without paths."""


def read_manifest(folder: Path) -> ModelManifest:
    """Raises `ModelUnavailable`."""
    try:
        return ModelManifest.from_json(json.loads((folder / MANIFEST_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelUnavailable("the model's manifest cannot be read") from error


def content_id(ref: WeightsRef, folder: Path) -> str:
    """Says whose files these are, and exactly which. Raises `ModelUnavailable`.

    Two teams that registered the same files have two images: none can tell from the time of a load what another has.
    """
    try:
        digest = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
        return f"{ref.model_id}/{ref.revision}/{digest}"
    except OSError as error:
        raise ModelUnavailable("the model's manifest cannot be read") from error


def verify_files(folder: Path, manifest: ModelManifest) -> None:
    """Compare every file with the checksum made at registration. Raises `ModelUnavailable` at the first difference."""
    for expected in manifest.files:
        with (folder / expected.name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected.sha256:
            raise ModelUnavailable(f"{expected.name} differs from what was registered")
