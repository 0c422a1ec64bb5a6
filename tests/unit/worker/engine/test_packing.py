"""Tokens that an earlier pass drew take their places beside tokens that the host knows."""

from __future__ import annotations

import torch

from services.worker.engine.packing import PackedTokens, token_tensor


def test_negative_tokens_stand_for_those_drawn_earlier() -> None:
    drawn = torch.tensor([70, 80, 90])
    batch = PackedTokens(tokens=(5, -1, -3, 6, -3), spans=(), drawn=drawn)
    assert token_tensor(batch, torch.device("cpu")).tolist() == [5, 70, 90, 6, 90]


def test_known_tokens_alone_need_nothing_drawn() -> None:
    assert token_tensor(PackedTokens(tokens=(5, 6), spans=()), torch.device("cpu")).tolist() == [5, 6]
