"""Decides whether a model folder may be registered, and says what model it holds.

`inspect_model_folder` never imports torch or transformers, unpickles nothing and runs no code of the folder but its tokenizer
and chat template. Those two are programs of strangers all the same: the gateway runs `python -m shared.model_folder FOLDER` as
a child, which limits its own memory and CPU time, and reads the answer with `read_child_answer`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from shared.chat_template import ChatTemplateError, compile_chat_template, render_chat_template
from shared.model_config import ModelTypeError
from shared.model_files import (
    CONFIG_FILES,
    INDEX_FILE,
    ModelFile,
    ModelFiles,
    ModelFolderError,
    ModelFolderErrorCode,
    ModelFolderLimits,
    open_model_files,
)
from shared.model_type import ModelType, describe_model_type

__all__ = [
    "ModelFile",
    "ModelFolderError",
    "ModelFolderErrorCode",
    "ModelFolderLimits",
    "ModelManifest",
    "inspect_model_folder",
    "read_child_answer",
]

SINGLE_WEIGHTS_FILE = "model.safetensors"
# Keys by which a folder asks a loader to fetch or run code.
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate"})
WEIGHT_DTYPES = frozenset({"BF16", "F16", "F32"})
SAMPLE_TEXT = "Hello, 2 + 2 = 4? Grüße 世界"
SAMPLE_MESSAGES = ({"role": "user", "content": "Hello"},)
MAX_SAMPLE_TOKENS = 1_000
# A system prompt that a template brings along may be long, but not without end.
MAX_SAMPLE_RENDER_CHARS = 200_000
MAX_EOS_TOKENS = 64
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# Measured: a tokenizer.json of 45 MB takes 660 MB while it is read, so one at the limit of 64 MiB about 1 GB.
DEFAULT_ADDRESS_SPACE_BYTES = 2 * 1024**3
# Measured: hashing runs at 1 GB/s on one core, so the largest folder takes some 320 s.
DEFAULT_CPU_S = 600
# The child answers on a pipe and writes no file; its output may still be redirected into one.
CHILD_FILE_BYTES = 16 * 1024**2


@dataclass(frozen=True, slots=True)
class ModelManifest:
    # Exactly what to copy; README and the like are not in it. The copier compares each digest.
    files: tuple[ModelFile, ...]
    architecture: str
    # 16 hex characters: the model type. Models with the same one may share a GPU process.
    signature: str
    canonical_config: Mapping[str, Any]
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    parameter_count: int
    has_chat_template: bool
    # Of an adapter, whose folder holds nothing else that is its own; all other facts are its base's.
    adapter_rank: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> ModelManifest:
        fields = dict(document)
        fields["files"] = tuple(ModelFile(**file) for file in fields["files"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return ModelManifest(**fields)


def inspect_model_folder(folder: Path, limits: ModelFolderLimits) -> ModelManifest:
    """Judge the folder, cheap checks first, and describe its model. Raises ModelFolderError.

    1. Names, kinds and sizes of files.
    2. No config asks for code of its own.
    3. The config is of a served architecture.
    4. The tokenizer loads, and no token id lies outside the vocabulary.
    5. The chat template, if any, renders a sample.
    6. The weights are sound safetensors and hold exactly the tensors that the config asks for.
    7. Everything else that will be copied is hashed.
    """
    with open_model_files(folder, limits) as files:  # 1
        for required in ("config.json", "tokenizer.json"):
            if required not in files:
                raise ModelFolderError(ModelFolderErrorCode.MISSING_FILE, f"{required} is missing")
        configs = {
            name: read_object(files, name)
            for name in sorted(CONFIG_FILES)
            if name in files and name.endswith(".json")
        }
        for name, config in configs.items():  # 2
            refuse_code_keys(name, config)
        try:  # 3
            model_type = describe_model_type(configs["config.json"])
        except ModelTypeError as error:
            raise ModelFolderError(ModelFolderErrorCode(error.code.value), str(error)) from error
        eos_token_ids = _eos_token_ids(configs, model_type.vocab_size)
        _check_tokenizer(files.read("tokenizer.json"), model_type.vocab_size)  # 4
        has_chat_template = _check_chat_template(files, configs.get("tokenizer_config.json", {}))  # 5
        parameter_count = _check_weights(files, model_type)  # 6
        return ModelManifest(
            files=files.manifest,  # 7
            architecture=model_type.architecture,
            signature=model_type.signature,
            canonical_config=model_type.canonical,
            context_tokens=model_type.context_tokens,
            vocab_size=model_type.vocab_size,
            eos_token_ids=eos_token_ids,
            parameter_count=parameter_count,
            has_chat_template=has_chat_template,
        )


def read_object(files: ModelFiles, name: str) -> dict[str, Any]:
    try:
        document = json.loads(
            files.read(name).decode("utf-8"),
            object_pairs_hook=_refuse_doubles,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(ModelFolderErrorCode.INVALID_CONFIG, f"{name} is not valid JSON") from error
    if not isinstance(document, dict):
        raise ModelFolderError(ModelFolderErrorCode.INVALID_CONFIG, f"{name} is not a JSON object")
    return document


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may pick different ones of two equal keys: the one that judges and the one that loads must agree.
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key comes twice")
    return document


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def refuse_code_keys(name: str, document: Any) -> None:
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found = CODE_KEYS & value.keys()
            if found:
                raise ModelFolderError(
                    ModelFolderErrorCode.REMOTE_CODE, f"{name} asks for code of its own ({min(found)})"
                )
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _eos_token_ids(configs: Mapping[str, Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """generation_config.json's, since chat models name the end of a turn there; else config.json's; none is allowed."""
    value = configs.get("generation_config.json", {}).get("eos_token_id")
    if value is None:
        value = configs["config.json"].get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_TOKENS or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ModelFolderError(
            ModelFolderErrorCode.INVALID_CONFIG, "eos_token_id is not a token of the vocabulary"
        )
    return tuple(dict.fromkeys(ids))


def _check_tokenizer(content: bytes, vocab_size: int) -> None:
    # Imported here: the library costs time and memory that a folder refused earlier does not need.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        sample = tokenizer.encode(SAMPLE_TEXT).ids
        tokenizer.decode(sample)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # A panic of the Rust library is a BaseException of its own kind, not an Exception.
    except BaseException as error:
        message = f"tokenizer.json does not load: {str(error)[:200]}"
        raise ModelFolderError(ModelFolderErrorCode.INVALID_TOKENIZER, message) from error
    if highest < 0 or not 0 < len(sample) <= MAX_SAMPLE_TOKENS:
        raise ModelFolderError(
            ModelFolderErrorCode.INVALID_TOKENIZER, "tokenizer.json does not turn a sample into tokens"
        )
    if highest >= vocab_size or max(sample) >= vocab_size:
        # On a GPU such an id reads outside the embedding and takes the whole process down, other teams' work included.
        message = f"tokenizer.json has token {highest}, the config's vocabulary ends at {vocab_size - 1}"
        raise ModelFolderError(ModelFolderErrorCode.INVALID_TOKENIZER, message)


def _check_chat_template(files: ModelFiles, tokenizer_config: Mapping[str, Any]) -> bool:
    sources = _chat_templates(files, tokenizer_config)
    special_tokens = {name: _token_text(tokenizer_config.get(name)) for name in SPECIAL_TOKENS}
    for source in sources:
        try:
            text = render_chat_template(
                compile_chat_template(source), SAMPLE_MESSAGES, special_tokens, add_generation_prompt=True
            )
        except ChatTemplateError as error:
            raise ModelFolderError(ModelFolderErrorCode.INVALID_CHAT_TEMPLATE, str(error)) from error
        if SAMPLE_MESSAGES[0]["content"] not in text or len(text) > MAX_SAMPLE_RENDER_CHARS:
            raise ModelFolderError(
                ModelFolderErrorCode.INVALID_CHAT_TEMPLATE,
                "the chat template loses the user's message, or writes far too much",
            )
    return bool(sources)


def _chat_templates(files: ModelFiles, tokenizer_config: Mapping[str, Any]) -> list[str]:
    """All that the folder holds: a file of its own, one text in tokenizer_config.json, or a list of named ones there."""
    sources: list[str] = []
    if "chat_template.jinja" in files:
        try:
            sources.append(files.read("chat_template.jinja").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ModelFolderError(
                ModelFolderErrorCode.INVALID_CHAT_TEMPLATE, "chat_template.jinja is not UTF-8"
            ) from error
    named = tokenizer_config.get("chat_template")
    entries = [] if named is None else named if isinstance(named, list) else [{"template": named}]
    for entry in entries:
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(template, str):
            raise ModelFolderError(ModelFolderErrorCode.INVALID_CHAT_TEMPLATE, "chat_template is not a text")
        sources.append(template)
    return sources


def _token_text(value: Any) -> str:
    """Special tokens are written as text or as an object with the text in it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _check_weights(files: ModelFiles, model_type: ModelType) -> int:
    """Compare all shards with the tensors that the type needs; returns how many parameters the model has."""
    shards = files.weights
    if not shards:
        raise ModelFolderError(ModelFolderErrorCode.MISSING_FILE, "there is no safetensors file")
    index = _read_index(files) if INDEX_FILE in files else None
    if index is None and shards != [SINGLE_WEIGHTS_FILE]:
        raise ModelFolderError(
            ModelFolderErrorCode.MISSING_FILE,
            f"weights must be one {SINGLE_WEIGHTS_FILE}, or shards with {INDEX_FILE}",
        )
    seen: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for shard in shards:
        for name, tensor in files.read_weights_header(shard).tensors.items():
            if name in seen:
                raise _mismatch(f"tensor {name[:80]!r} is in two files")
            seen[name] = (shard, tensor.dtype, tensor.shape)
    if index is not None and index != {name: shard for name, (shard, _, _) in seen.items()}:
        raise _mismatch(f"{INDEX_FILE} does not name exactly the tensors of the files")
    return _compare_tensors({name: (dtype, shape) for name, (_, dtype, shape) in seen.items()}, model_type)


def _read_index(files: ModelFiles) -> dict[str, Any]:
    index = read_object(files, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict):
        raise ModelFolderError(ModelFolderErrorCode.INVALID_CONFIG, f"{INDEX_FILE} has no weight_map")
    return index


def _compare_tensors(seen: Mapping[str, tuple[str, tuple[int, ...]]], model_type: ModelType) -> int:
    allowed = dict(model_type.tensors)
    if model_type.tied_embeddings:
        # Some writers save the tied head as well; it may be there, and must have its shape.
        allowed[f"{model_type.names.heads[0]}.weight"] = allowed[model_type.names.embedding]
    usual_names = model_type.names.usual(seen)
    present = set(usual_names.values())
    for name, shape in model_type.tensors.items():
        if name not in present:
            raise _mismatch(f"tensor {name!r} {list(shape)} is missing")
    if len(present) < len(usual_names):
        raise _mismatch("two tensors stand for the same one under different names")
    for name, (dtype, found) in seen.items():
        usual = usual_names[name]
        # Old checkpoints store what the engine computes itself, in any form.
        if usual in model_type.names.ignored:
            continue
        if usual not in allowed:
            raise _mismatch(f"tensor {name[:80]!r} is not one of {model_type.architecture}")
        if found != allowed[usual]:
            raise _mismatch(f"tensor {name!r} is {list(found)}, the config asks for {list(allowed[usual])}")
        if dtype not in WEIGHT_DTYPES:
            raise _mismatch(f"tensor {name!r} is {dtype}; weights are {', '.join(sorted(WEIGHT_DTYPES))}")
    return sum(_elements(shape) for shape in model_type.tensors.values())


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _mismatch(message: str) -> ModelFolderError:
    return ModelFolderError(ModelFolderErrorCode.TENSOR_MISMATCH, message)


def read_child_answer(returncode: int, stdout: bytes) -> ModelManifest:
    """Turn what `python -m shared.model_folder` left into its manifest, or raise its ModelFolderError. Pure.

    A child that a signal ended hit a limit: CPU time kills, memory aborts inside native code. One that ended by itself without
    an answer has a bug: ValueError.
    """
    if returncode < 0:
        raise ModelFolderError(
            ModelFolderErrorCode.CHECK_LIMIT_EXCEEDED, "checking the model took too much time or memory"
        )
    try:
        answer = json.loads(stdout)
    except ValueError as error:
        raise ValueError(f"the model check ended with status {returncode} and no answer") from error
    if returncode == 0:
        return ModelManifest.from_json(answer)
    raise ModelFolderError(ModelFolderErrorCode(answer["error"]["code"]), answer["error"]["message"])


def _limit_this_process(address_space_bytes: int, cpu_s: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHILD_FILE_BYTES, CHILD_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Python turns SIGXCPU's default into nothing of its own: the kernel's default, death, is what is wanted.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    # One thread: each would reserve address space and multiply the CPU time.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _inspect(folder: Path, base: Path | None) -> ModelManifest:
    if base is None:
        return inspect_model_folder(folder, ModelFolderLimits())
    # Imported here: it is made of this module.
    from shared.adapter_folder import inspect_adapter_folder

    return inspect_adapter_folder(folder, base, ModelFolderLimits())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shared.model_folder", description="Check a model folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, help="the folder of the checked model that the adapter is for")
    parser.add_argument("--address-space-bytes", type=int, default=DEFAULT_ADDRESS_SPACE_BYTES)
    parser.add_argument("--cpu-s", type=int, default=DEFAULT_CPU_S)
    options = parser.parse_args(arguments)
    _limit_this_process(options.address_space_bytes, options.cpu_s)
    try:
        answer: dict[str, Any] = _inspect(options.folder, options.base).to_json()
        returncode = 0
    except ModelFolderError as error:
        answer, returncode = {"error": {"code": error.code.value, "message": error.message}}, 1
    except MemoryError:
        code = ModelFolderErrorCode.CHECK_LIMIT_EXCEEDED
        answer, returncode = (
            {"error": {"code": code.value, "message": "checking the model took too much memory"}},
            1,
        )
    print(json.dumps(answer, sort_keys=True))
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
