"""Takes a model folder into the store: checks it in a child process, copies what the check listed, and nothing else.

The store's layout is `<model id>/<revision>/` with the model's files and `manifest.json`. A folder appears there by
one rename, whole and verified, or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import structlog

from services.gateway.children import run_child
from services.gateway.threads import run_to_its_end
from shared.inference.errors import ApiError, bad_request
from shared.model_folder import ModelFile, ModelFolderError, ModelManifest, read_child_answer

log = structlog.get_logger()

CHECK_TIMEOUT_S = 60.0
HASHED_BYTES_PER_S = 100e6
"""A slow disk's speed: the check reads every byte, so large models get more time."""
CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """param: what named it in the request, for refusals."""

    folder: Path
    param: str


@dataclass(frozen=True, slots=True)
class ModelImporter:
    """import_dir: where operators put folders to register. store: what workers read."""

    import_dir: Path
    store: Path
    one_at_a_time: asyncio.Lock
    """Checks and copies are heavy on disk and memory; a second one waits."""

    def find(self, path: str) -> Path:
        """Return the folder below the import folder. Raises `ApiError` 400 for what is not there, or outside."""
        relative = PurePosixPath(path)
        root = self.import_dir.resolve()
        try:
            if not relative.is_absolute() and ".." not in relative.parts:
                folder = (root / relative).resolve()
                # A link may lead out of the import folder although the path does not.
                if folder.is_relative_to(root) and folder != root and folder.is_dir():
                    return folder
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links
            log.info("import_path_unusable", error=type(error).__name__)
        raise bad_request("invalid_path", "There is no such folder below the import folder.", "path")

    async def check(self, source: SourceFolder, base_folder: str | None) -> ModelManifest:
        """Inspect the folder in a child process with limits. Raises `ApiError` 400 with the check's own code.

        base_folder: of an adapter, its base's folder below the store.
        """
        limit_s = CHECK_TIMEOUT_S + await asyncio.to_thread(_bytes_in, source) / HASHED_BYTES_PER_S
        base = [] if base_folder is None else ["--base", str(self.store / base_folder)]
        try:
            status, stdout = await run_child("shared.model_folder", [str(source.folder), *base], limit_s)
        except TimeoutError as error:
            message = "Checking the model took too long."
            raise bad_request("check_limit_exceeded", message, source.param) from error
        try:
            return read_child_answer(status, stdout)
        except ModelFolderError as error:
            raise bad_request(error.code.value, error.message[:300], source.param) from error

    async def take(self, source: SourceFolder, manifest: ModelManifest, name: str) -> None:
        """Copy the manifest's files into the store, as the folder `name` below it."""
        try:
            # To its end, so that what it made can be removed by the caller.
            await run_to_its_end(self._copy, source, manifest, self.store / name)
        except OSError as error:
            log.error("model_copy_failed", folder=name, error=str(error))
            raise ApiError(507, "store_full", "The model could not be written to the store.") from error

    async def remove(self, name: str) -> None:
        """Remove what `take` made, of a registration that failed later: a revision's folder, or all of a model's."""
        await asyncio.to_thread(shutil.rmtree, self.store / name, ignore_errors=True)

    async def sweep(self, names: Iterable[str]) -> list[str]:
        """Remove the folders of models and revisions that are gone, and return which of them there were."""
        found = await asyncio.to_thread(lambda: [name for name in names if (self.store / name).is_dir()])
        for name in found:
            try:
                await asyncio.to_thread(shutil.rmtree, self.store / name)
            except FileNotFoundError:
                continue  # another gateway is at it, too
            except OSError as error:
                log.error("unused_model_not_removed", folder=name, error=str(error))
        return found

    def _copy(self, source: SourceFolder, manifest: ModelManifest, target: Path) -> None:
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for file in manifest.files:
                _place(source, part / file.name, file)
            (part / "manifest.json").write_text(
                json.dumps(manifest.to_json(), sort_keys=True), encoding="utf-8"
            )
            os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _place(source: SourceFolder, target: Path, file: ModelFile) -> None:
    """Put one file into the store. Weights are linked where that is possible, all else is copied.

    What lies in the store is hashed: between check and copy the source may have become another file. Raises `ApiError`.
    """
    path = source.folder / file.name
    linked = False
    if file.name.endswith(".safetensors"):
        try:
            os.link(path, target, follow_symlinks=False)
            linked = True
        except OSError:
            linked = False  # another file system, or one without links
    if not linked:
        # O_NOFOLLOW: the name may have become a link since the check.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _changed(source) from error
        with os.fdopen(descriptor, "rb") as reading, target.open("xb") as writing:
            shutil.copyfileobj(reading, writing, CHUNK_BYTES)
    if target.is_symlink() or not target.is_file() or _sha256(target) != file.sha256:
        raise _changed(source)


def _changed(source: SourceFolder) -> ApiError:
    return bad_request("folder_changed", "The folder changed while it was registered.", source.param)


def _bytes_in(source: SourceFolder) -> int:
    try:
        with os.scandir(source.folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except FileNotFoundError as error:  # an upload without files, or one that ended meanwhile
        raise _changed(source) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
