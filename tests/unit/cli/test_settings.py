from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.settings import Server, load_server
from shared.settings import SettingsError

STORED = "ROUNDHOUSE_URL=http://a:1\nROUNDHOUSE_API_KEY=sk-stored\nROUNDHOUSE_ADMIN_KEY=sk-admin\nROUNDHOUSE_MODEL='demo/m'\n"


@pytest.mark.parametrize(
    ("environment", "stored", "expected"),
    [
        ({}, STORED, Server("http://a:1", "sk-stored", "demo/m")),
        ({"ROUNDHOUSE_API_KEY": "sk-mine"}, STORED, Server("http://a:1", "sk-mine", "demo/m")),
        ({"ROUNDHOUSE_URL": "http://a:1/"}, STORED, Server("http://a:1", "sk-stored", "demo/m")),
        (
            {"ROUNDHOUSE_URL": "http://b:2", "ROUNDHOUSE_API_KEY": "sk-b"},
            STORED,
            Server("http://b:2", "sk-b", None),
        ),
        (
            {"ROUNDHOUSE_URL": "http://b:2/", "ROUNDHOUSE_API_KEY": "sk-b", "ROUNDHOUSE_MODEL": "x/y"},
            None,
            Server("http://b:2", "sk-b", "x/y"),
        ),
    ],
)
def test_the_environment_comes_before_the_file(
    tmp_path: Path, environment: dict[str, str], stored: str | None, expected: Server
) -> None:
    file = tmp_path / "env"
    if stored is not None:
        file.write_text(stored)
    assert load_server(environment, file) == expected


@pytest.mark.parametrize(
    ("environment", "stored", "missing"),
    [
        ({}, None, "ROUNDHOUSE_URL"),
        ({"ROUNDHOUSE_API_KEY": "sk-x"}, None, "ROUNDHOUSE_URL"),
        ({"ROUNDHOUSE_URL": "http://a:1"}, None, "ROUNDHOUSE_API_KEY"),
        # The key of one server is not sent to another
        ({"ROUNDHOUSE_URL": "http://elsewhere:1"}, STORED, "ROUNDHOUSE_API_KEY"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, environment: dict[str, str], stored: str | None, missing: str
) -> None:
    file = tmp_path / "env"
    if stored is not None:
        file.write_text(stored)
    with pytest.raises(SettingsError, match=f"^{missing} is not set") as caught:
        load_server(environment, file)
    assert "sk-" not in str(caught.value)
