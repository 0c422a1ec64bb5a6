"""`make demo-hotswap`: ten fine-tunes answer in turn on the demo team's one worker, which has memory for some of them.

The ten are the two demo fine-tunes, each mixed into the base at five strengths. They are registered over the API, asked
over `/v1` with the `openai` package, and removed again. What runs is the stack of `make up`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from infra.local.bf16_safetensors import (
    Bf16,
    read_bf16_safetensors,
    to_bf16,
    to_float32,
    write_bf16_safetensors,
)
from infra.local.demo import MODEL_TYPE, TEAM
from infra.local.demo_model import BASE_NAME, FINE_TUNES
from infra.local.failures import SetupFailed
from infra.local.layout import Layout, main_layout
from infra.local.management_api import ApiError, ManagementApi
from infra.local.progress import fail, say, step

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
PREFIX = "hotswap-"
QUESTION = "Tell me about the sea."
ANSWER_TOKENS = 24
REGISTER_LIMIT_S, ASK_LIMIT_S, IMAGES_LIMIT_S = 300.0, 120.0, 300.0
SHOWN_CHARACTERS = 44


@dataclass(frozen=True, slots=True)
class Asked:
    """first_token_ms: from the acceptance on."""

    model: str
    text: str
    swap_ms: float
    first_token_ms: float


def main() -> int:
    try:
        run(main_layout())
    except (SetupFailed, ApiError, openai.OpenAIError) as error:
        fail(f"demo-hotswap: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(layout: Layout, strengths: Sequence[float] = STRENGTHS) -> None:
    """Raises SetupFailed, ApiError, openai.OpenAIError."""
    url, key, admin_key = read_env(layout)
    platform = ManagementApi(url, admin_key, timeout_s=REGISTER_LIMIT_S)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=ASK_LIMIT_S)
    with registered_mixes(platform, layout, strengths) as model_ids:
        run_rounds(client, list(model_ids), lambda: wait_for_images(layout, model_ids.values()))


def read_env(layout: Layout) -> tuple[str, str, str]:
    """The running stack's address, the demo team's key, the platform's key. Raises SetupFailed."""
    try:
        lines = layout.env_file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise SetupFailed("nothing is set up yet: run 'make up' first") from error
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return values["ROUNDHOUSE_URL"], values["ROUNDHOUSE_API_KEY"], values["ROUNDHOUSE_ADMIN_KEY"]


@contextmanager
def registered_mixes(
    platform: ManagementApi, layout: Layout, strengths: Sequence[float]
) -> Iterator[dict[str, str]]:
    """Registered while the block runs, their ids by name; those of a demo that was killed go first."""
    _remove(platform, layout)
    model_ids: dict[str, str] = {}
    try:
        with step("fine-tunes made"):
            folders = [
                folder
                for persona in sorted(FINE_TUNES)
                for folder in make_mixes(layout.models, persona, strengths)
            ]
        with step("registered over the API"):
            for folder in folders:
                body = {"name": folder.name, "path": folder.name, "model_type": MODEL_TYPE}
                made = platform.post("/api/models", body, team=TEAM)
                model_ids[made["name"]] = made["model_id"]
        yield model_ids
    finally:
        with step("removed again"):
            _remove(platform, layout)


def _remove(platform: ManagementApi, layout: Layout) -> None:
    models = platform.list("/api/models", team=TEAM)
    model_ids = [model["model_id"] for model in models if model["name"].startswith(f"{TEAM}/{PREFIX}")]
    for model_id in model_ids:
        platform.delete(f"/api/models/{model_id}", team=TEAM)
    for image in images_of(layout, model_ids):
        image.unlink(missing_ok=True)
    for folder in layout.models.glob(f"{PREFIX}*"):
        shutil.rmtree(folder)


def make_mixes(models: Path, persona: str, strengths: Sequence[float]) -> Iterator[Path]:
    """Folders of the base with so much of the fine-tune's change: 1.0 is the fine-tune itself."""
    base = read_bf16_safetensors(models / BASE_NAME / "model.safetensors")
    tuned = read_bf16_safetensors(models / persona / "model.safetensors")
    for strength in strengths:
        folder = models / f"{PREFIX}{persona.rsplit('-', 1)[-1]}-{round(100 * strength):03}"
        shutil.copytree(models / persona, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        mixed = {name: mix(base[name], tuned[name], strength) for name in base}
        write_bf16_safetensors(folder / "model.safetensors", mixed)
        yield folder


def mix(base: Bf16, tuned: Bf16, strength: float) -> Bf16:
    if (base == tuned).all():
        return base
    start = to_float32(base)
    return to_bf16(start + strength * (to_float32(tuned) - start))


def run_rounds(client: openai.OpenAI, names: Sequence[str], wait_for_images: Callable[[], None]) -> None:
    say(f'\n"{QUESTION}"\n')
    say("From their folders; an image of each is made meanwhile:")
    first = [_ask_and_print(client, name) for name in names]
    with step("waiting for the images"):
        wait_for_images()
    say("\nFrom their images:")
    second = [_ask_and_print(client, name) for name in names]
    say("\nFive of them, then the same five again: what fits into the worker's memory stays there:")
    third = [_ask_and_print(client, name) for name in (*names[:5], *names[:5])]
    say("")
    for title, asked in (("from folders", first), ("from images", second), ("five, twice", third)):
        swaps = [each.swap_ms for each in asked if each.swap_ms > 0]
        median = f", median {statistics.median(swaps):.0f} ms" if swaps else ""
        say(f"  {title + ':':<14} {len(swaps):>2} swaps for {len(asked)} answers{median}")


def _ask_and_print(client: openai.OpenAI, model: str) -> Asked:
    asked = ask(client, model)
    say(
        f"  {model:<24} {shorten(asked.text):<{SHOWN_CHARACTERS}}  swap {asked.swap_ms:6.0f} ms   "
        f"first token {asked.first_token_ms:6.0f} ms"
    )
    return asked


def ask(client: openai.OpenAI, model: str) -> Asked:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
    )
    if answer.usage is None:
        raise SetupFailed(f"{model} answered without usage")
    spent: dict[str, Any] = (answer.usage.model_extra or {})["roundhouse"]
    first_token_ms = spent["queue_ms"] + spent["swap_ms"] + spent["prefill_ms"]
    return Asked(model, answer.choices[0].message.content or "", spent["swap_ms"], first_token_ms)


def shorten(text: str) -> str:
    """The first words, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1] + "…"


def images_of(layout: Layout, model_ids: Iterable[str]) -> set[Path]:
    """Of this host's workers."""
    images = layout.home / "images"
    return {path for model_id in model_ids for path in images.glob(f"{model_id}-*.image")}


def wait_for_images(layout: Layout, model_ids: Iterable[str]) -> None:
    """Until each model has one. Raises SetupFailed."""
    deadline_s = time.monotonic() + IMAGES_LIMIT_S
    for model_id in model_ids:
        while not images_of(layout, [model_id]):
            if time.monotonic() > deadline_s:
                raise SetupFailed(f"no image of {model_id}: see 'make logs NAMES=workers'")
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
