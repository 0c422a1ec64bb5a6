"""The scheduler gives out only what the engine runs: the two know nothing of each other."""

from __future__ import annotations

import itertools

import pytest

from services.scheduler.command_rules import NOT_BUILT
from services.worker.engine import EngineConfig
from services.worker.engine.engine import check_config

PAIRS = list(itertools.product(("cpu", "cuda"), ("fp32", "bf16", "int8")))


@pytest.mark.parametrize(("device_kind", "precision"), PAIRS)
def test_an_option_is_refused_just_when_the_engine_would_not_start_with_it(
    device_kind: str, precision: str
) -> None:
    config = EngineConfig(device=device_kind, precision=precision)
    if (device_kind, precision) in NOT_BUILT:
        with pytest.raises(ValueError, match=precision):
            check_config(config)
    else:
        check_config(config)


def test_every_pair_that_is_not_built_is_one_that_could_be_asked_for() -> None:
    assert NOT_BUILT <= set(PAIRS)
