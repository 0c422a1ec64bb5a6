"""What the demo of swaps makes and prints; the stack that it runs on is real only in `make demo-hotswap` itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from infra.local.bf16_safetensors import read_bf16_safetensors, to_bf16, to_float32, write_bf16_safetensors
from infra.local.demo_hotswap import STRENGTHS, make_mixes, mix, read_env, shorten, wait_for_images
from infra.local.demo_model import BASE_NAME
from infra.local.failures import SetupFailed
from infra.local.layout import Layout

BASE = to_bf16(np.array([1.0, -2.0, 0.5, 4.0], dtype=np.float32))
TUNED = to_bf16(np.array([2.0, -2.0, 0.0, 4.0], dtype=np.float32))


def test_a_mix_has_as_much_of_the_change_as_it_says() -> None:
    assert (mix(BASE, TUNED, 0.0) == BASE).all() and (mix(BASE, TUNED, 1.0) == TUNED).all()
    assert to_float32(mix(BASE, TUNED, 0.5)).tolist() == [1.5, -2.0, 0.25, 4.0]


def test_five_folders_of_each_fine_tune_differ_in_their_weights_alone(tmp_path: Path) -> None:
    for name, weights in ((BASE_NAME, BASE), ("smollm2-135m-pirate", TUNED)):
        (tmp_path / name).mkdir()
        write_bf16_safetensors(tmp_path / name / "model.safetensors", {"a": weights})
        (tmp_path / name / "config.json").write_text("{}")
    folders = list(make_mixes(tmp_path, "smollm2-135m-pirate", STRENGTHS))
    assert [folder.name for folder in folders] == [
        f"hotswap-pirate-{share}" for share in ("040", "060", "080", "100", "120")
    ]
    assert all((folder / "config.json").read_text() == "{}" for folder in folders)
    found = [tuple(read_bf16_safetensors(folder / "model.safetensors")["a"].tolist()) for folder in folders]
    assert len(set(found)) == len(STRENGTHS)
    assert found[3] == tuple(TUNED.tolist())


def test_long_answers_show_their_first_words() -> None:
    assert shorten(" Ahoy,\n matey ") == "Ahoy, matey"
    assert len(shorten("word " * 100)) <= 44 and shorten("word " * 100).endswith("…")


def test_without_a_stack_the_user_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="make up"):
        read_env(Layout(tmp_path))
    (tmp_path / "env").write_text("ROUNDHOUSE_URL=http://h:1\nROUNDHOUSE_API_KEY=k\nROUNDHOUSE_ADMIN_KEY=a\n")
    assert read_env(Layout(tmp_path)) == ("http://h:1", "k", "a")


def test_images_of_these_models_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.demo_hotswap.IMAGES_LIMIT_S", 0.0)
    images = tmp_path / "images"
    images.mkdir()
    for name in ("mod_0-1-aa", "mod_1-1-bb", "mod_1-2-cc"):
        (images / f"{name}.image").touch()
    wait_for_images(Layout(tmp_path), ["mod_1"])
    with pytest.raises(SetupFailed, match="no image of mod_2"):
        wait_for_images(Layout(tmp_path), ["mod_1", "mod_2"])
