"""Lists, opens, reads and hashes the files of a model folder that nobody trusts.

Knows which names a model folder may hold and which contents are never a model's; not what they mean together. All opening goes
through the folder's descriptor and never follows a link, and what is judged is exactly what is hashed, in one pass: whoever
copies a file later compares the digest and so has the judged bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from shared.safetensors_header import (
    LENGTH_PREFIX_BYTES,
    SafetensorsError,
    SafetensorsHeader,
    TruncatedSafetensorsError,
    parse_header_length,
    parse_safetensors_header,
)

CONFIG_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
)
TOKENIZER_FILES = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
# Papers that come with a model: left where they are, neither read nor copied.
IGNORED_NAME = re.compile(
    r"(README|LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(md|txt))?|\.gitattributes", re.IGNORECASE
)
# Unpickled, imported or otherwise run by some loader. Other unknown names are refused as well; these get a reason.
RUNNABLE_SUFFIXES = frozenset({
    ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".pkl", ".pickle", ".joblib", ".mar", ".nemo", ".npy", ".npz", ".h5", ".hdf5", ".keras",
    ".onnx", ".gguf", ".ggml", ".msgpack", ".py", ".pyc", ".so", ".sh", ".zip", ".tar", ".gz", ".tgz", ".7z",
})  # fmt: skip
# (offset, bytes) of formats that unpack or run something, whatever the file calls itself.
MAGIC_BYTES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"\xfd7zXZ", "xz data"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a numpy file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x7fELF", "a program"),
    (0, b"#!", "a script"),
    (257, b"ustar", "a tar archive"),
    *((0, bytes([0x80, protocol]), "a pickle") for protocol in range(2, 6)),
)
SNIFFED_BYTES = 262
CHUNK_BYTES = 4 * 1024 * 1024


class ModelFolderErrorCode(StrEnum):
    NOT_A_MODEL_FOLDER = "not_a_model_folder"
    UNSAFE_MODEL_FILE = "unsafe_model_file"
    REMOTE_CODE = "remote_code"
    MISSING_FILE = "missing_file"
    MODEL_TOO_LARGE = "model_too_large"
    INVALID_CONFIG = "invalid_config"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    UNSUPPORTED_CONFIG = "unsupported_config"
    TRUNCATED_SAFETENSORS = "truncated_safetensors"
    INVALID_SAFETENSORS = "invalid_safetensors"
    TENSOR_MISMATCH = "tensor_mismatch"
    INVALID_TOKENIZER = "invalid_tokenizer"
    INVALID_CHAT_TEMPLATE = "invalid_chat_template"
    INVALID_ADAPTER = "invalid_adapter"
    ADAPTER_NEEDS_BASE = "adapter_needs_base"
    FOLDER_CHANGED = "folder_changed"
    CHECK_LIMIT_EXCEEDED = "check_limit_exceeded"


class ModelFolderError(Exception):
    """The folder is refused. `message` is for the person who registers it and names no path outside the folder."""

    def __init__(self, code: ModelFolderErrorCode, message: str) -> None:
        # Parts of it come from the folder. What a log line, a database or a JSON reader may choke on is replaced.
        self.message = "".join(char if char.isprintable() else "?" for char in message)
        super().__init__(self.message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ModelFolderLimits:
    """Sizes above which a folder is refused before it is read."""

    # Twice a 70B model in bf16: above what one device of today serves.
    total_bytes: int = 300 * 1024**3
    # The largest public tokenizer.json (Gemma's) has 33 MB.
    tokenizer_file_bytes: int = 64 * 1024**2
    config_file_bytes: int = 1024**2
    # The index names every tensor with its file: some 100 bytes each.
    index_file_bytes: int = 16 * 1024**2
    files: int = 512


@dataclass(frozen=True, slots=True)
class ModelFile:
    name: str
    size_bytes: int
    sha256: str


class ModelFiles:
    """The model's files of one open folder: already judged by name, kind and size, not yet by content."""

    def __init__(self, folder_fd: int, sizes: dict[str, int]) -> None:
        self._folder_fd = folder_fd
        self._sizes = sizes
        self._manifest: dict[str, ModelFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    @property
    def weights(self) -> list[str]:
        return sorted(name for name in self._sizes if WEIGHTS_NAME.fullmatch(name))

    @property
    def manifest(self) -> tuple[ModelFile, ...]:
        """Every file of the model; those not read so far are read and hashed now."""
        for name in self._sizes.keys() - self._manifest.keys():
            self.read(name)
        return tuple(self._manifest[name] for name in sorted(self._manifest))

    def read(self, name: str) -> bytes:
        with _open_regular(self._folder_fd, name) as file:
            content = file.read(self._sizes[name] + 1)
        if len(content) != self._sizes[name]:
            raise _changed(name)
        _refuse_magic(name, content[:SNIFFED_BYTES])
        self._manifest[name] = ModelFile(name, len(content), hashlib.sha256(content).hexdigest())
        return content

    def read_weights_header(self, name: str) -> SafetensorsHeader:
        """Judge the header, then hash the whole file in the same pass."""
        size = self._sizes[name]
        digest = hashlib.sha256()
        with _open_regular(self._folder_fd, name) as file:
            head = file.read(SNIFFED_BYTES)
            # A sound header of 640 to 1535 bytes begins with the very bytes of a pickle: the brace behind the length decides.
            if head[LENGTH_PREFIX_BYTES : LENGTH_PREFIX_BYTES + 1] != b"{":
                _refuse_magic(name, head)
            try:
                header_end = LENGTH_PREFIX_BYTES + parse_header_length(head[:LENGTH_PREFIX_BYTES], size)
                head += file.read(max(0, header_end - len(head)))
                header = parse_safetensors_header(head[LENGTH_PREFIX_BYTES:header_end], size)
            except TruncatedSafetensorsError as error:
                raise ModelFolderError(
                    ModelFolderErrorCode.TRUNCATED_SAFETENSORS, f"{name}: {error}"
                ) from error
            except SafetensorsError as error:
                raise ModelFolderError(
                    ModelFolderErrorCode.INVALID_SAFETENSORS, f"{name}: {error}"
                ) from error
            digest.update(head)
            hashed_bytes = len(head)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                hashed_bytes += len(chunk)
        if hashed_bytes != size:
            raise _changed(name)
        self._manifest[name] = ModelFile(name, size, digest.hexdigest())
        return header


@contextlib.contextmanager
def open_model_files(
    folder: Path, limits: ModelFolderLimits, *, adapter: bool = False
) -> Iterator[ModelFiles]:
    """Open the folder of a model, or of an adapter, and judge what lies in it, without reading contents.

    Raises ModelFolderError.

    1. The folder itself is a folder and not a link.
    2. Not more entries than the limit.
    3. Regular files only: no link, sub-folder, pipe, socket or device.
    4. Papers (README, LICENSE, ...) are left out, and beside an adapter what its base has; any other name that is not
       needed is refused.
    5. No file, and not all together, over its limit.
    """
    try:  # 1
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFolderError(
            ModelFolderErrorCode.NOT_A_MODEL_FOLDER, "the model folder cannot be opened"
        ) from error
    try:
        names = os.listdir(folder_fd)
        if len(names) > limits.files:  # 2
            raise ModelFolderError(ModelFolderErrorCode.MODEL_TOO_LARGE, f"more than {limits.files} files")
        sizes: dict[str, int] = {}
        for name in sorted(names):
            status = _status(folder_fd, name)
            if not stat.S_ISREG(status.st_mode):  # 3
                raise _unsafe(f"{_shown(name)} is not a regular file")
            if IGNORED_NAME.fullmatch(name) or (adapter and name in CONFIG_FILES | TOKENIZER_FILES):  # 4
                continue
            limit = size_limit(name, limits, adapter=adapter)
            if status.st_size > limit:  # 5
                raise ModelFolderError(ModelFolderErrorCode.MODEL_TOO_LARGE, f"{name} is over {limit} bytes")
            sizes[name] = status.st_size
        if sum(sizes.values()) > limits.total_bytes:
            raise ModelFolderError(
                ModelFolderErrorCode.MODEL_TOO_LARGE, f"the files are over {limits.total_bytes} bytes"
            )
        yield ModelFiles(folder_fd, sizes)
    finally:
        os.close(folder_fd)


def _status(folder_fd: int, name: str) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError as error:
        raise _changed(name) from error


def size_limit(name: str, limits: ModelFolderLimits, *, adapter: bool = False) -> int:
    """How many bytes a file of this name may have. Raises ModelFolderError for a name that no such folder holds."""
    if adapter:
        if name == ADAPTER_CONFIG:
            return limits.config_file_bytes
        if name == ADAPTER_WEIGHTS:
            return limits.total_bytes
        raise _unsafe(f"{_shown(name)} is not a file that an adapter's folder may hold")
    if name == ADAPTER_CONFIG:
        message = "this is an adapter: it is registered with the base that it was trained on"
        raise ModelFolderError(ModelFolderErrorCode.ADAPTER_NEEDS_BASE, message)
    if name in CONFIG_FILES:
        return limits.config_file_bytes
    if name in TOKENIZER_FILES:
        return limits.tokenizer_file_bytes
    if name == INDEX_FILE:
        return limits.index_file_bytes
    if WEIGHTS_NAME.fullmatch(name):
        return limits.total_bytes
    if Path(name).suffix.lower() in RUNNABLE_SUFFIXES:
        raise _unsafe(
            f"{_shown(name)}: this kind of file can run code; weights are accepted as safetensors only"
        )
    raise _unsafe(f"{_shown(name)} is not a file that a model folder may hold")


@contextlib.contextmanager
def _open_regular(folder_fd: int, name: str) -> Iterator[BinaryIO]:
    # O_NONBLOCK: were the name swapped for a pipe meanwhile, opening it must not wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOENT, errno.ENXIO):
            raise _changed(name) from error
        raise ModelFolderError(
            ModelFolderErrorCode.NOT_A_MODEL_FOLDER, f"{_shown(name)} cannot be read"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _changed(name)
        yield file


def _refuse_magic(name: str, head: bytes) -> None:
    for offset, magic, kind in MAGIC_BYTES:
        if head.startswith(magic, offset):
            raise _unsafe(f"{name} is {kind} under another name")


def _shown(name: str) -> str:
    return ascii(name[:80])


def _unsafe(message: str) -> ModelFolderError:
    return ModelFolderError(ModelFolderErrorCode.UNSAFE_MODEL_FILE, message)


def _changed(name: str) -> ModelFolderError:
    return ModelFolderError(
        ModelFolderErrorCode.FOLDER_CHANGED, f"{_shown(name)} changed while it was checked"
    )
