"""`make demo-hotswap` on the running stack, with two models instead of ten: what it shows, and that nothing is left."""

from __future__ import annotations

import re

import pytest

from infra.local.demo import PLATFORM_TEAM, TEAM
from infra.local.demo_hotswap import PREFIX, images_of, run
from infra.local.layout import e2e_layout
from tests.e2e.conftest import System


@pytest.mark.timeout(400)
def test_the_demo_of_swaps_shows_answers_and_their_swaps_and_leaves_nothing(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = e2e_layout()
    before = set((layout.home / "images").glob("*.image"))
    run(layout, strengths=(0.8,))
    shown = capsys.readouterr().out
    rows = re.findall(
        r"demo/hotswap-(pirate|formal)-080 +(\S.*?)  swap +(\d+) ms +first token +(\d+) ms", shown
    )
    assert [persona for persona, *_ in rows] == ["formal", "pirate"] * 4
    answers = {(persona, text) for persona, text, *_ in rows}
    assert len(answers) == 2, "each says the same each time, and not what the other says"
    assert all(int(swap_ms) > 0 for _, _, swap_ms, _ in rows[:2]), "they were registered a moment ago"
    assert all(int(swap_ms) < int(first_ms) for _, _, swap_ms, first_ms in rows)
    models = [
        model["model_id"]
        for team in (TEAM, PLATFORM_TEAM)
        for model in system.platform.list("/api/models", team=team)
    ]
    left = set((layout.home / "images").glob("*.image")) - before
    assert left <= images_of(layout, models), "other models' may have been made meanwhile"
    assert not list(layout.models.glob(f"{PREFIX}*"))
    assert not [model for model in system.platform.list("/api/models", team=TEAM) if PREFIX in model["name"]]
