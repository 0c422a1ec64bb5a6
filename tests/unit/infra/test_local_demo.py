"""The demo set-up is repeatable, and `.local/env` is safe to read into a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from infra.local.demo import TEAM, Demo, ensure_demo
from infra.local.demo_model import BASE_NAME, FINE_TUNES
from infra.local.failures import SetupFailed
from infra.local.management_api import ApiError, ManagementApi
from infra.local.start import Stack, env_text

FOLDERS = [BASE_NAME, *FINE_TUNES]


class RecordingApi:
    """Stands in for the gateway behind `ManagementApi`: keeps what was created, and counts writes."""

    def __init__(self) -> None:
        self.items: dict[str, list[dict[str, Any]]] = {}
        self.writes: list[str] = []
        self.resource_states = ["starting", "live"]
        self.valid_keys: set[str] = set()

    def call(
        self, key: str, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None
    ) -> dict[str, Any]:
        if method != "GET" and path != "/v1/chat/completions":
            self.writes.append(f"{method} {path}")
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": " Paris. "}}]}
        if path == "/v1/models":
            if key not in self.valid_keys:
                raise ApiError(401, "invalid_api_key", "no")
            return {"data": []}
        if path.endswith("/on"):
            self.items["/api/resources"][-1]["wanted"] = "on"
            return {}
        if path.startswith("/api/resources/"):
            state = self.resource_states[0] if len(self.resource_states) == 1 else self.resource_states.pop(0)
            return {"state": state, "reason": ""}
        items = self.items.setdefault(path, [])
        if method == "GET":
            return {
                "data": [each for each in items if each.get("team") == query.get("team")],
                "next_cursor": None,
            }
        return self._create(items, path, query.get("team"), body or {})

    def _create(
        self, items: list[dict[str, Any]], path: str, team: str | None, body: dict[str, Any]
    ) -> dict[str, Any]:
        item = {**body, **({"team": team} if team else {})}
        if path == "/api/models":
            item["name"] = f"{team}/{body['name']}"
        if path == "/api/resources":
            item |= {"resource_id": f"res-{len(items)}", "wanted": "off"}
        if path == "/api/keys":
            item["secret"] = f"sk-rh-{len(items)}"
            self.valid_keys.add(item["secret"])
        items.append(item)
        return item


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingApi]:
    api = RecordingApi()

    def call(self: ManagementApi, method: str, path: str, query: Any, body: Any) -> dict[str, Any]:
        return api.call(self.key, method, path, dict(query), body)

    monkeypatch.setattr(ManagementApi, "_call", call)
    monkeypatch.setattr("infra.local.demo.POLL_S", 0.0)
    yield api


PLATFORM = ManagementApi("http://127.0.0.1:1", "sk-rh-platform")


def test_a_first_run_makes_everything_and_a_second_one_makes_nothing(gateway: RecordingApi) -> None:
    demo = ensure_demo(PLATFORM, "", FOLDERS, "cpu")
    assert demo == Demo("sk-rh-0", f"{TEAM}/{BASE_NAME}", "Paris.")
    names = {item["name"] for item in gateway.items["/api/models"]}
    assert names == {f"demo/{folder}" for folder in FOLDERS} | {f"platform/{BASE_NAME}"}
    assert {item["name"] for item in gateway.items["/api/options"]} == {"bf16", "int8"}
    assert {item["work_class"] for item in gateway.items["/api/prices"]} == {"live", "batch"}
    wanted = {item["name"]: item["wanted"] for item in gateway.items["/api/resources"]}
    assert wanted == {"demo": "on", "smollm2 pool": "off"}

    gateway.writes.clear()
    assert ensure_demo(PLATFORM, demo.key, FOLDERS, "cpu") == demo
    assert gateway.writes == []


def test_on_gpus_the_demo_has_only_what_runs_there(gateway: RecordingApi) -> None:
    ensure_demo(PLATFORM, "", FOLDERS, "cuda")
    options = {(item["name"], item["device_kind"]) for item in gateway.items["/api/options"]}
    assert options == {("bf16", "cuda")}
    assert {item["name"]: item["option"] for item in gateway.items["/api/resources"]} == {
        "demo": "bf16",
        "smollm2 pool": "bf16",
    }


def test_a_revoked_demo_key_is_replaced(gateway: RecordingApi) -> None:
    first = ensure_demo(PLATFORM, "", FOLDERS, "cpu")
    gateway.valid_keys.clear()
    second = ensure_demo(PLATFORM, first.key, FOLDERS, "cpu")
    assert second.key != first.key and second.key in gateway.valid_keys


def test_a_resource_that_never_goes_live_is_said_with_its_state(
    gateway: RecordingApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.local.demo.LIVE_LIMIT_S", 0.0)
    gateway.resource_states = ["failed"]
    with pytest.raises(SetupFailed, match=r"not live after 0 s \(failed\)"):
        ensure_demo(PLATFORM, "", FOLDERS, "cpu")


def test_an_unreachable_gateway_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupFailed, match="the gateway does not answer") as caught:
        ensure_demo(PLATFORM, "", FOLDERS, "cpu")
    assert "\n" not in str(caught.value)


def test_the_env_file_gives_a_shell_exactly_the_values() -> None:
    awkward = Demo(key="sk-'$(echo no)\"", model="demo/a model", answer="")
    text = env_text(Stack("http://127.0.0.1:8080", "sk-rh-admin", awkward))
    script = (
        text
        + 'printf "%s|" "$ROUNDHOUSE_URL" "$ROUNDHOUSE_API_KEY" "$ROUNDHOUSE_ADMIN_KEY" "$ROUNDHOUSE_MODEL"'
    )
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == "http://127.0.0.1:8080|sk-'$(echo no)\"|sk-rh-admin|demo/a model|"
