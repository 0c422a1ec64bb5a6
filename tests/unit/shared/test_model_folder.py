"""The registration check against sound and hostile folders, each built from a tiny Llama and one change."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from shared.model_folder import (
    ModelFolderError,
    ModelFolderLimits,
    ModelManifest,
    inspect_model_folder,
    read_child_answer,
)
from tests.model_folders import (
    TEMPLATE,
    VOCABULARY,
    Json,
    Tensors,
    edit_config,
    edit_json,
    make_config,
    make_folder,
    make_tensors,
    make_tokenizer,
    raw_safetensors,
    safetensors_bytes,
    shard,
    write_json,
)

Change = Callable[[Path], object]

LIMITS = ModelFolderLimits()


def refusal(folder: Path, limits: ModelFolderLimits = LIMITS) -> str:
    with pytest.raises(ModelFolderError) as caught:
        inspect_model_folder(folder, limits)
    return caught.value.code.value


def test_manifest_describes_a_sound_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "README.md").write_text("not copied")
    (folder / "LICENSE").write_text("not copied")

    manifest = inspect_model_folder(folder, LIMITS)

    assert [file.name for file in manifest.files] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in manifest.files:
        content = (folder / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.architecture == "LlamaForCausalLM"
    assert (manifest.context_tokens, manifest.vocab_size) == (64, VOCABULARY)
    assert manifest.eos_token_ids == (257, 256)
    assert manifest.has_chat_template
    # Embedding 258 x 8, final norm 8, and per layer: q 64, k and v 32 each, o 64, three of 128, two norms of 8.
    assert manifest.parameter_count == 258 * 8 + 8 + 2 * (64 + 32 + 32 + 64 + 3 * 128 + 16)


def test_manifest_survives_json(tmp_path: Path) -> None:
    manifest = inspect_model_folder(make_folder(tmp_path / "model"), LIMITS)

    assert ModelManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_shards_with_an_index_count_as_one_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    whole = inspect_model_folder(folder, LIMITS)

    shard(folder)

    manifest = inspect_model_folder(folder, LIMITS)
    assert (manifest.signature, manifest.parameter_count) == (whole.signature, whole.parameter_count)


def test_header_whose_length_looks_like_a_pickle_is_accepted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    content = safetensors_bytes(make_tensors(make_config()))
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    # The format allows spaces at the end. 0x010480 begins with 80 04, which is how a pickle of protocol 4 begins.
    (folder / "model.safetensors").write_bytes(raw_safetensors(header.ljust(0x010480), data))

    assert (folder / "model.safetensors").read_bytes()[:2] == b"\x80\x04"
    inspect_model_folder(folder, LIMITS)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("no chat template", lambda f: write_json(f / "tokenizer_config.json", {})),
        ("a template of its own", lambda f: (f / "chat_template.jinja").write_text(TEMPLATE)),
        (
            "named templates",
            lambda f: write_json(
                f / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": TEMPLATE}]}
            ),
        ),
        (
            "generation marks",
            lambda f: (f / "chat_template.jinja").write_text(
                "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
            ),
        ),
        ("no generation config", lambda f: (f / "generation_config.json").unlink()),
        (
            "a tied head saved too",
            lambda f: (f / "model.safetensors").write_bytes(
                safetensors_bytes(make_tensors(make_config()) | {"lm_head.weight": ("BF16", (VOCABULARY, 8))})
            ),
        ),
        (
            "an old rotary buffer",
            lambda f: (f / "model.safetensors").write_bytes(
                safetensors_bytes(
                    make_tensors(make_config())
                    | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,))}
                )
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folder_is_accepted_with(tmp_path: Path, case: str, change: Change) -> None:
    folder = make_folder(tmp_path / "model")
    change(folder)

    manifest = inspect_model_folder(folder, LIMITS)

    assert manifest.has_chat_template == (case != "no chat template")


class Canary:
    """Touches the file named by MODEL_CANARY when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {os.environ['MODEL_CANARY']}",))


def zip_bytes(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"data")
    return buffer.getvalue()


def replace_by_link(folder: Path) -> None:
    target = folder.parent / "elsewhere.json"
    (folder / "config.json").rename(target)
    (folder / "config.json").symlink_to(target)


def one_tensor(entry: Json, data_bytes: int) -> bytes:
    return raw_safetensors(json.dumps({"a": entry}).encode(), b"\0" * data_bytes)


def weights(content: bytes) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def weights_of(change: Callable[[Tensors], object]) -> Change:
    def write(folder: Path) -> None:
        tensors = make_tensors(make_config())
        change(tensors)
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))

    return write


def cut_weights(bytes_kept: Callable[[int], int]) -> Change:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, bytes_kept(path.stat().st_size))

    return cut


def lose_second_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2-of-2.safetensors").unlink()


def repeat_tensors_in_second_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2-of-2.safetensors").write_bytes(safetensors_bytes(make_tensors(make_config())))


F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OVERLAP = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
GAP = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}'
DOUBLE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

HOSTILE: list[tuple[str, str, Change]] = [
    # Files that a folder may not hold, by name and kind.
    *(
        (f"a {name}", "unsafe_model_file", lambda f, name=name: (f / name).write_bytes(b"x"))
        for name in (
            "pytorch_model.bin", "model.pt", "model.PTH", "model.ckpt", "data.pkl", "model.pt2", "model.gguf", "model.onnx",
            "tf_model.h5", "modeling_evil.py", "model.safetensors.zip", "notes.txt", ".hidden", "model.safetensors.bak",
            "-model.safetensors", "a b.safetensors", "run.sh", "model.mar", "README.py",
        )
    ),
    ("a sub-folder", "unsafe_model_file", lambda f: (f / "extra").mkdir()),
    ("a folder named like a file", "unsafe_model_file", lambda f: (f / "merges.txt").mkdir()),
    ("a link to a file outside", "unsafe_model_file", replace_by_link),
    ("a link to nothing", "unsafe_model_file", lambda f: (f / "vocab.json").symlink_to("/nonexistent")),
    ("a link among the papers", "unsafe_model_file", lambda f: (f / "README.md").symlink_to("/etc/passwd")),
    ("a pipe", "unsafe_model_file", lambda f: os.mkfifo(f / "merges.txt")),
    # Contents under another name.
    ("a zip as weights", "unsafe_model_file", weights(zip_bytes("../../escape"))),
    ("a pickle as weights", "unsafe_model_file", weights(b"\x80\x04\x95" + b"\0" * 300)),
    ("a GGUF as weights", "unsafe_model_file", weights(b"GGUF\x03\0\0\0" + b"\0" * 300)),
    ("a tar as weights", "unsafe_model_file", weights(b"\0" * 257 + b"ustar\x0000" + b"\0" * 300)),
    ("gzip as a tokenizer", "unsafe_model_file", lambda f: (f / "tokenizer.json").write_bytes(b"\x1f\x8b\x08\0")),
    ("a pickle as merges", "unsafe_model_file", lambda f: (f / "merges.txt").write_bytes(pickle.dumps([1], protocol=4))),
    ("a script as vocabulary", "unsafe_model_file", lambda f: (f / "vocab.json").write_bytes(b"#!/bin/sh\n")),
    # Code of its own.
    ("auto_map in the config", "remote_code", lambda f: edit_config(f, auto_map={"AutoModel": "evil.Evil"})),
    ("auto_map in the tokenizer", "remote_code", lambda f: edit_json(f / "tokenizer_config.json", auto_map={})),
    ("auto_map deep down", "remote_code", lambda f: edit_config(f, text_config={"list": [{"auto_map": {}}]})),
    ("trust_remote_code", "remote_code", lambda f: edit_config(f, trust_remote_code=False)),
    ("custom_pipelines", "remote_code", lambda f: edit_config(f, custom_pipelines={})),
    ("custom_generate", "remote_code", lambda f: edit_json(f / "generation_config.json", custom_generate="x")),
    # Configs.
    ("no config", "missing_file", lambda f: (f / "config.json").unlink()),
    ("no tokenizer", "missing_file", lambda f: (f / "tokenizer.json").unlink()),
    ("no weights", "missing_file", lambda f: (f / "model.safetensors").unlink()),
    ("an empty config", "invalid_config", lambda f: (f / "config.json").write_bytes(b"")),
    ("a config that is a list", "invalid_config", lambda f: (f / "config.json").write_bytes(b"[]")),
    ("a config that is not UTF-8", "invalid_config", lambda f: (f / "config.json").write_bytes(b'{"a":"\xff"}')),
    ("a config nested too deeply", "invalid_config", lambda f: (f / "config.json").write_bytes(b'{"a":' + b"[" * 100_000)),
    ("a key twice", "invalid_config", lambda f: (f / "config.json").write_bytes(b'{"a":1,"a":2}')),
    ("NaN in the config", "invalid_config", lambda f: (f / "config.json").write_bytes(b'{"a":NaN}')),
    ("an endless number", "invalid_config", lambda f: (f / "config.json").write_bytes(b'{"a":' + b"1" * 5000 + b"}")),
    ("an infinite theta", "invalid_config", lambda f: (f / "config.json").write_text(
        json.dumps(make_config()).replace("10000.0", "1e999"))),
    ("another architecture", "unsupported_architecture", lambda f: edit_config(f, architectures=["EvilForCausalLM"])),
    ("two architectures", "invalid_config", lambda f: edit_config(f, architectures=["LlamaForCausalLM"] * 2)),
    ("no architecture", "invalid_config", lambda f: edit_config(f, architectures=...)),
    ("a foreign model_type", "invalid_config", lambda f: edit_config(f, model_type="lightglue")),
    ("quantized weights", "unsupported_config", lambda f: edit_config(f, quantization_config={"bits": 4})),
    ("an unknown rope", "unsupported_config", lambda f: edit_config(f, rope_scaling={"type": "dynamic", "factor": 2})),
    ("an unknown rope setting", "unsupported_config", lambda f: edit_config(
        f, rope_scaling={"type": "linear", "factor": 2, "extra": 1})),
    ("two rope settings", "invalid_config", lambda f: edit_config(
        f, rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_type": "default"})),
    ("an unknown activation", "unsupported_config", lambda f: edit_config(f, hidden_act="evil")),
    ("an activation of another kind", "unsupported_config", lambda f: edit_config(f, hidden_act=["silu"])),
    ("a negative size", "invalid_config", lambda f: edit_config(f, hidden_size=-8)),
    ("a size that is true", "invalid_config", lambda f: edit_config(f, num_hidden_layers=True)),
    ("an absurd size", "invalid_config", lambda f: edit_config(f, num_hidden_layers=10**9)),
    ("heads that do not fit", "invalid_config", lambda f: edit_config(f, num_key_value_heads=3)),
    ("an odd head", "invalid_config", lambda f: edit_config(f, head_dim=3)),
    ("an end token outside", "invalid_config", lambda f: edit_json(f / "generation_config.json", eos_token_id=VOCABULARY)),
    ("an end token of another kind", "invalid_config", lambda f: edit_json(
        f / "generation_config.json", eos_token_id=["2"])),
    # Safetensors.
    ("empty weights", "truncated_safetensors", weights(b"")),
    ("weights cut in the prefix", "truncated_safetensors", cut_weights(lambda size: 5)),
    ("weights cut in the header", "truncated_safetensors", cut_weights(lambda size: 100)),
    ("weights cut by one byte", "truncated_safetensors", cut_weights(lambda size: size - 1)),
    ("weights cut in half", "truncated_safetensors", cut_weights(lambda size: size // 2 + 500)),
    ("trailing data", "invalid_safetensors", lambda f: (f / "model.safetensors").open("ab").write(b"x")),
    ("a header of 1 GB", "invalid_safetensors", weights((1 << 30).to_bytes(8, "little") + b"{")),
    ("a header of 2^64 bytes", "invalid_safetensors", weights(b"\xff" * 8 + b"{}")),
    ("a header that is no JSON", "invalid_safetensors", weights(raw_safetensors(b"{nonsense"))),
    ("a header nested too deeply", "invalid_safetensors", weights(raw_safetensors(b'{"a":' + b"[" * 100_000))),
    ("a header that is a list", "invalid_safetensors", weights(raw_safetensors(b"[]", b"\0" * 300))),
    ("a name twice", "invalid_safetensors", weights(raw_safetensors(DOUBLE, b"\0" * 8))),
    ("overlapping tensors", "invalid_safetensors", weights(raw_safetensors(OVERLAP, b"\0" * 12))),
    ("a gap", "invalid_safetensors", weights(raw_safetensors(GAP, b"\0" * 16))),
    ("negative offsets", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"data_offsets": [-8, 0]}, 8))),
    ("offsets backwards", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"data_offsets": [8, 0]}, 8))),
    ("offsets as fractions", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"data_offsets": [0.0, 8.0]}, 8))),
    ("a wrong dtype", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"dtype": "F64"}, 8))),
    ("an unknown dtype", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"dtype": "OBJECT"}, 8))),
    ("a negative shape", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"shape": [-1, -2]}, 8))),
    ("a shape that overflows", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"shape": [2**63, 2**63]}, 8))),
    ("a foreign key", "invalid_safetensors", weights(one_tensor(F32_PAIR | {"code": "x"}, 8))),
    ("metadata of another kind", "invalid_safetensors", weights(raw_safetensors(b'{"__metadata__":{"a":1}}'))),
    # Sound files that are not this model.
    ("a missing tensor", "tensor_mismatch", weights_of(lambda t: t.pop("model.norm.weight"))),
    ("a foreign tensor", "tensor_mismatch", weights_of(lambda t: t.update({"evil": ("BF16", (1,))}))),
    ("a foreign layer", "tensor_mismatch", weights_of(
        lambda t: t.update({"model.layers.2.input_layernorm.weight": ("BF16", (8,))}))),
    ("a wrong shape", "tensor_mismatch", weights_of(lambda t: t.update({"model.norm.weight": ("BF16", (9,))}))),
    ("integers as weights", "tensor_mismatch", weights_of(lambda t: t.update({"model.norm.weight": ("I8", (8,))}))),
    ("a head that is not tied", "tensor_mismatch", lambda f: edit_config(f, tie_word_embeddings=False)),
    ("more layers than weights", "tensor_mismatch", lambda f: edit_config(f, num_hidden_layers=3)),
    ("weights under another name", "missing_file", lambda f: (f / "model.safetensors").rename(f / "other.safetensors")),
    ("a second file of weights", "missing_file", lambda f: (f / "more.safetensors").write_bytes(raw_safetensors(b"{}"))),
    ("an index without a map", "invalid_config", lambda f: write_json(f / "model.safetensors.index.json", {})),
    ("an index that lies", "tensor_mismatch", lambda f: write_json(
        f / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "../other.safetensors"}})),
    ("a shard too few", "tensor_mismatch", lose_second_shard),
    ("a tensor in two shards", "tensor_mismatch", repeat_tensors_in_second_shard),
    # Tokenizer and template.
    ("a tokenizer that is no JSON", "invalid_tokenizer", lambda f: (f / "tokenizer.json").write_text("{")),
    ("a tokenizer of another shape", "invalid_tokenizer", lambda f: (f / "tokenizer.json").write_text("{}")),
    ("a tokenizer without tokens", "invalid_tokenizer", lambda f: Tokenizer(models.BPE()).save(str(f / "tokenizer.json"))),
    ("a token outside the embedding", "invalid_tokenizer", lambda f: add_token(f)),
    ("a template that does not compile", "invalid_chat_template", lambda f: template(f, "{% for %}")),
    ("a template that refuses", "invalid_chat_template", lambda f: template(f, "{{ raise_exception('no') }}")),
    ("a template that loses the text", "invalid_chat_template", lambda f: template(f, "hello")),
    ("a template that fails", "invalid_chat_template", lambda f: template(f, "{{ messages[7].content.x }}")),
    ("a template that calls itself", "invalid_chat_template", lambda f: template(
        f, "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")),
    ("a template out for Python's objects", "invalid_chat_template", lambda f: template(
        f, "{{ messages[0].content }}{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    ("a template out for globals", "invalid_chat_template", lambda f: template(
        f, "{{ messages[0].content }}{{ raise_exception.__globals__['json'] }}")),
    ("a template that changes its input", "invalid_chat_template", lambda f: template(
        f, "{{ messages[0].content }}{{ messages[0].update({'content': 'x'}) }}")),
    ("a template with a huge range", "invalid_chat_template", lambda f: template(
        f, "{{ messages[0].content }}{% for i in range(999999999) %}x{% endfor %}")),
    ("a template that is a number", "invalid_chat_template", lambda f: edit_json(
        f / "tokenizer_config.json", chat_template=7)),
    ("a bad template beside a good one", "invalid_chat_template", lambda f: (
        f / "chat_template.jinja").write_text("{{ raise_exception('no') }}")),
]  # fmt: skip


def template(folder: Path, source: str) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=source)


def add_token(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one-too-many"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("code", "change"), [(code, change) for _, code, change in HOSTILE], ids=[case for case, _, _ in HOSTILE]
)
def test_folder_is_refused_for(tmp_path: Path, code: str, change: Change) -> None:
    folder = make_folder(tmp_path / "model")
    change(folder)

    assert refusal(folder) == code


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "merges.txt", "tokenizer.json", "config.json"]
)
def test_nothing_in_a_folder_is_unpickled(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("MODEL_CANARY", str(canary))
    folder = make_folder(tmp_path / "model")
    bomb = pickle.dumps(Canary())
    (folder / name).write_bytes(bomb)

    assert refusal(folder) == "unsafe_model_file"

    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists(), "the bomb must work, or this test proves nothing"


def test_folder_that_is_a_link_or_a_file_or_missing_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)

    for path in (tmp_path / "link", folder / "config.json", tmp_path / "missing"):
        assert refusal(path) == "not_a_model_folder"


@pytest.mark.parametrize(
    "limits",
    [
        ModelFolderLimits(config_file_bytes=100),
        ModelFolderLimits(tokenizer_file_bytes=1000),
        ModelFolderLimits(total_bytes=5000),
        ModelFolderLimits(files=4),
    ],
)
def test_folder_over_a_limit_is_refused(tmp_path: Path, limits: ModelFolderLimits) -> None:
    assert refusal(make_folder(tmp_path / "model"), limits) == "model_too_large"


def test_sparse_tokenizer_of_500_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    os.truncate(folder / "tokenizer.json", 500 * 1024**2)

    assert refusal(folder) == "model_too_large"


def test_message_is_fit_for_logs_and_databases(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": ["a\\u0000b\\ud800\\n\\u202e"]}')

    with pytest.raises(ModelFolderError) as caught:
        inspect_model_folder(folder, LIMITS)

    assert caught.value.message.isprintable()
    caught.value.message.encode("utf-8")


def run_child(folder: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "shared.model_folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, timeout=60)


def test_child_answers_as_the_function_does(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")

    done = run_child(folder)

    assert done.returncode == 0, done.stderr
    assert read_child_answer(done.returncode, done.stdout) == inspect_model_folder(folder, LIMITS)


def test_child_hands_on_the_refusal(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "model.pkl").write_bytes(b"")

    done = run_child(folder)

    assert done.returncode == 1
    with pytest.raises(ModelFolderError) as caught:
        read_child_answer(done.returncode, done.stdout)
    assert caught.value.code == "unsafe_model_file"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        # Ranges of 100,000 are within the sandbox's rules; nested they run for hours.
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ("--cpu-s", "1")),
        ("{{ messages[0].content * 2**31 }}", ("--address-space-bytes", str(2 * 1024**3))),
    ],
    ids=["time", "memory"],
)
def test_child_ends_when_a_template_eats(tmp_path: Path, source: str, options: tuple[str, ...]) -> None:
    folder = make_folder(tmp_path / "model")
    template(folder, "{{ messages[0].content }}" + source)

    done = run_child(folder, *options)

    with pytest.raises(ModelFolderError) as caught:
        read_child_answer(done.returncode, done.stdout)
    assert caught.value.code == "check_limit_exceeded"


def test_child_without_an_answer_is_a_bug_and_not_a_refusal() -> None:
    with pytest.raises(ValueError, match="status 2"):
        read_child_answer(2, b"")


def test_check_imports_no_torch_and_no_transformers() -> None:
    program = (
        "import shared.model_folder, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )

    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
