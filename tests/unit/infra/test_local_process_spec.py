"""The pure decisions about processes: back-off, order of stopping, words for an exit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local.process_spec import (
    HEALTHY_AFTER_S,
    LONGEST_RESTART_DELAY_S,
    ProcessSpec,
    exit_words,
    failures_after_exit,
    restart_delay_s,
    stop_order,
)


def make_spec(name: str, *depends_on: str, stop_after: tuple[str, ...] = ()) -> ProcessSpec:
    return ProcessSpec(name=name, command=("true",), env={}, depends_on=depends_on, stop_after=stop_after)


@pytest.mark.parametrize(
    ("failures", "expected_s"), [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 15.0), (10**6, 15.0)]
)
def test_restart_delay_doubles_up_to_its_bound(failures: int, expected_s: float) -> None:
    assert restart_delay_s(failures) == expected_s <= LONGEST_RESTART_DELAY_S


@pytest.mark.parametrize(
    ("failures", "was_ready_s", "expected"),
    [(0, 0.0, 1), (4, 0.0, 5), (4, HEALTHY_AFTER_S - 1, 5), (4, HEALTHY_AFTER_S, 1)],
)
def test_a_healthy_stretch_forgives_earlier_failures(
    failures: int, was_ready_s: float, expected: int
) -> None:
    assert failures_after_exit(failures, was_ready_s) == expected


def test_stop_order_is_dependants_first_and_obeys_stop_after() -> None:
    specs = [
        make_spec("db"),
        make_spec("gateway", "db"),
        make_spec("agent", "db", stop_after=("gateway",)),
        make_spec("billing", "db", stop_after=("agent", "gateway")),
    ]
    assert stop_order(specs) == [["gateway"], ["agent"], ["billing"], ["db"]]


def test_stop_order_stops_at_once_what_is_independent() -> None:
    assert stop_order([make_spec("a"), make_spec("b"), make_spec("c", "a", "b")]) == [["c"], ["a", "b"]]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([make_spec("a", "b"), make_spec("b", "a")], "wait for each other"),
        ([make_spec("a", stop_after=("a",))], "wait for each other"),
        ([make_spec("a", "nobody")], "unknown"),
        ([make_spec("a"), make_spec("a")], "used twice"),
    ],
)
def test_stop_order_refuses_what_cannot_be_ordered(specs: list[ProcessSpec], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stop_order(specs)


@given(st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=8))
def test_stop_order_never_stops_a_dependency_before_its_dependant(edges: list[set[int]]) -> None:
    """Dependencies point to smaller numbers only, so that there is no cycle."""
    specs = [make_spec(str(i), *(str(j) for j in below if j < i)) for i, below in enumerate(edges)]
    order = stop_order(specs)
    position = {name: index for index, group in enumerate(order) for name in group}
    assert sorted(position) == sorted(spec.name for spec in specs)
    for spec in specs:
        assert all(position[spec.name] < position[dependency] for dependency in spec.depends_on)


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")],
)
def test_exit_words(code: int, words: str) -> None:
    assert exit_words(code) == words
