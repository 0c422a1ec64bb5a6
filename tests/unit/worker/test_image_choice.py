"""Which images leave a full folder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.image_choice import StoredImage, choose_removals


def image(key: str, size_bytes: int, last_used_s: float, is_held: bool = False) -> StoredImage:
    return StoredImage(key, size_bytes, last_used_s, is_held)


@pytest.mark.parametrize(
    ("images", "coming", "removed"),
    [
        pytest.param([], 10, [], id="empty"),
        pytest.param([], 11, None, id="larger than the folder"),
        pytest.param([image("a", 5, 1)], 5, [], id="just fits"),
        pytest.param([image("a", 5, 1), image("b", 5, 2)], 1, ["a"], id="the longest unused goes"),
        pytest.param([image("a", 5, 1, True), image("b", 5, 2)], 1, ["b"], id="not one that is held"),
        pytest.param([image("a", 5, 1, True), image("b", 5, 2, True)], 1, None, id="all are held"),
        pytest.param(
            [image("a", 6, 1, True), image("b", 4, 2)], 5, None, id="what is not held is too little"
        ),
        pytest.param(
            [image("a", 1, 1), image("b", 1, 2), image("c", 8, 3)],
            7,
            ["c"],
            id="small ones need not go along",
        ),
        pytest.param(
            [image("a", 3, 1), image("b", 3, 2), image("c", 4, 3)], 6, ["a", "b"], id="as many as must"
        ),
        pytest.param([image("b", 5, 1), image("a", 5, 1)], 1, ["a"], id="of equals, by name"),
    ],
)
def test_removals(images: list[StoredImage], coming: int, removed: list[str] | None) -> None:
    assert choose_removals(images, coming, limit_bytes=10) == removed


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.booleans()), max_size=8),
    st.integers(0, 30),
)
def test_what_is_chosen_suffices_and_none_of_it_could_stay(
    values: list[tuple[int, int, bool]], coming: int
) -> None:
    images = [image(str(n), size, used, held) for n, (size, used, held) in enumerate(values)]
    removed = choose_removals(images, coming, limit_bytes=40)
    held = sum(each.size_bytes for each in images if each.is_held)
    if removed is None:
        assert held + coming > 40
        return
    sizes = {each.key: each.size_bytes for each in images}
    left = sum(sizes.values()) - sum(sizes[key] for key in removed) + coming
    assert left <= 40
    assert not {each.key for each in images if each.is_held} & set(removed)
    assert all(left + sizes[key] > 40 for key in removed)
