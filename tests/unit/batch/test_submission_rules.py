"""The rules of submission without a server: what a message is, what it comes to, what changes at the broker."""

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from services.batch.submission.intake import teams_of
from services.batch.submission.judging import Judged, judge
from services.batch.submission.provisioning import Changes, Credential, plan
from services.batch.submission.replies import result
from services.batch.submission.tables import DueResult
from shared.completion_window import window_s
from shared.messages import MAX_MESSAGE_BYTES
from shared.queue_format import (
    MAX_LINES,
    MAX_SUBMISSION_BYTES,
    Refusal,
    read_submission,
)
from shared.topology import Rights
from tests.conftest import ROOT

SCHEMA = json.loads((ROOT / "shared" / "queue_format.v1.schema.json").read_text())
TAG, OTHER_TAG = "0" * 24, "1" * 24


def line(custom_id: str = "a", **change: Any) -> dict[str, Any]:
    made = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"model": "m"}}
    return made | change


def credential(name: str = "one", *, tag: str = TAG, **change: Any) -> Credential:
    values: dict[str, Any] = {
        "credential_id": f"qcr_{name}", "team_id": f"team_{tag[:1]}", "key_id": "key_1", "name": name,
        "password_hash": "h", "tag": tag, "is_revoked": False, "is_applied": True,
    }  # fmt: skip
    return Credential(**(values | change))


# ---- the format


GOOD: list[dict[str, Any]] = [
    {"version": 1, "id": "a", "lines": [line()]},
    {"version": 1.0, "id": "a", "lines": [line()]},
    {"version": 1, "id": "!~" * 64, "lines": [line(str(n)) for n in range(MAX_LINES)]},
    {"version": 1, "id": "a", "lines": [line()], "completion_window": "30m"},
    {"version": 1, "id": "a", "lines": [line()], "completion_window": "168h"},
    {"version": 1, "id": "a", "lines": [line(more="fields of a line are not ours to judge")]},
]
BAD: list[dict[str, Any]] = [
    {},
    {"id": "a", "lines": [line()]},
    {"version": 2, "id": "a", "lines": [line()]},
    {"version": "1", "id": "a", "lines": [line()]},
    {"version": True, "id": "a", "lines": [line()]},
    {"version": None, "id": "a", "lines": [line()]},
    {"version": 1, "lines": [line()]},
    {"version": 1, "id": "", "lines": [line()]},
    {"version": 1, "id": "a b", "lines": [line()]},
    {"version": 1, "id": "\u00e4", "lines": [line()]},
    {"version": 1, "id": "a" * 129, "lines": [line()]},
    {"version": 1, "id": 1, "lines": [line()]},
    {"version": 1, "id": "a"},
    {"version": 1, "id": "a", "lines": []},
    {"version": 1, "id": "a", "lines": {}},
    {"version": 1, "id": "a", "lines": [line(str(n)) for n in range(MAX_LINES + 1)]},
    {"version": 1, "id": "a", "lines": [line()], "extra": 1},
    *(
        {"version": 1, "id": "a", "lines": [line()], "completion_window": each}
        for each in ("", "24", "0h", "169h", "1d", "h", 24, "24h ", "012h")
    ),
    *(
        {"version": 1, "id": "a", "lines": [each]}
        for each in (1, {}, line(custom_id=""), line(custom_id="a" * 257), line(method="GET"), line(url="/v1/models"),
                     line(body=1), line(body={}), line(body={"model": 1}))
    ),
]  # fmt: skip


def accepts(message: dict[str, Any]) -> bool:
    team = teams_of([credential()])[TAG]
    return isinstance(judge(json.dumps(message).encode(), next(iter(team.users)), team), Judged)


@pytest.mark.parametrize("message", GOOD)
def test_the_schema_and_the_code_accept_the_same(message: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(message)
    assert accepts(message)


@pytest.mark.parametrize("message", BAD)
def test_the_schema_and_the_code_refuse_the_same(message: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(message)
    assert not accepts(message)


def test_an_id_ends_where_it_ends() -> None:
    assert not accepts(
        {"version": 1, "id": "a\n", "lines": [line()]}
    )  # readers of `$` in patterns differ about this one


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    codes = SCHEMA["$defs"]["refused"]["properties"]["code"]["enum"]
    page = (ROOT / "services" / "batch" / "README.md").read_text()
    assert [code for code in codes if f"`{code}`" not in page] == []


@pytest.mark.parametrize(("size", "code"), [(MAX_SUBMISSION_BYTES, "invalid_json"), (MAX_SUBMISSION_BYTES + 1, "message_too_large")])  # fmt: skip
def test_a_message_has_so_many_bytes(size: int, code: str) -> None:
    found = read_submission(b"x" * size)
    assert isinstance(found, Refusal) and found.code == code


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"null", b"1", b'"a"', b"[1]", b"{", b'{"version":1} {}', b'\xef\xbb\xbf{"version":1}', b'{"id":"\xc3"}',
     b'{"version":' + b"[" * 100_000 + b"}", b'{"version":' + b'{"a":' * 100_000],
)  # fmt: skip
def test_what_is_no_json_object_is_refused_whatever_it_is(body: bytes) -> None:
    found = read_submission(body)
    assert isinstance(found, Refusal) and found.code == "invalid_json" and found.id is None


def test_a_refusal_knows_the_message_s_id_if_it_has_one() -> None:
    changes: list[dict[str, Any]] = [{"version": 2}, {"lines": []}, {"extra": 1}]
    for change in changes:
        found = read_submission(json.dumps({"version": 1, "id": "mine", "lines": [line()]} | change).encode())
        assert isinstance(found, Refusal) and found.id == "mine"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m", 60), ("30m", 1800), ("9999m", 599_940), ("1h", 3600), ("168h", 604_800), ("169h", None), ("01h", None),
     ("0m", None), ("1H", None), ("1h\n", None), ("\u0661h", None), ("", None)],
)  # fmt: skip
def test_a_window_is_minutes_or_hours(text: str, seconds: int | None) -> None:
    assert window_s(text) == seconds


# ---- whose it is


def test_a_reply_queue_is_the_team_s_own() -> None:
    teams = teams_of([credential("one"), credential("two"), credential("one", tag=OTHER_TAG)])
    mine, others = teams[TAG], teams[OTHER_TAG]
    assert len(mine.users) == 2 and mine.team_id != others.team_id
    body = json.dumps(GOOD[0]).encode()
    for queue, user in mine.users.items():
        found = judge(body, queue, mine)
        assert isinstance(found, Judged) and found.user is user and found.reply_queue == queue
    wrong = [
        *others.users,
        mine.names.refusals.name,
        mine.names.submissions.name,
        "dead.v1",
        next(iter(mine.users)) + "x",
    ]
    assert [getattr(judge(body, queue, mine), "code", None) for queue in wrong] == ["foreign_reply_to"] * 5
    for nobody in (None, ""):
        refusal = judge(body, nobody, mine)
        assert isinstance(refusal, Refusal) and (refusal.code, refusal.id) == ("missing_reply_to", "a")


def test_one_wrong_line_refuses_all_and_each_wrong_one_is_named() -> None:
    team = teams_of([credential()])[TAG]
    lines = [line("a"), line("a"), line("b", method="GET"), line("c")]
    body = json.dumps({"version": 1, "id": "m", "lines": lines}).encode()
    found = judge(body, next(iter(team.users)), team)
    assert isinstance(found, Refusal) and found.code == "invalid_lines"
    assert [(each["code"], each["line"]) for each in found.errors] == [
        ("duplicate_custom_id", 2),
        ("invalid_method", 3),
    ]


def test_the_same_content_has_the_same_digest_and_no_other() -> None:
    team = teams_of([credential()])[TAG]
    queue = next(iter(team.users))
    first, again, other = (
        judge(json.dumps({"version": 1, "id": "m", "lines": [line(name)]}).encode(), queue, team)
        for name in ("a", "a", "b")
    )
    assert isinstance(first, Judged) and isinstance(again, Judged) and isinstance(other, Judged)
    assert first.digest == again.digest != other.digest


# ---- what changes at the broker

ONE, TWO = credential("one"), credential("two")
BOTH = {"qcr_one": "h", "qcr_two": "h", "somebody": "x"}
RIGHTS = {"qcr_one": ONE.rights, "qcr_two": TWO.rights, "somebody": Rights(".*", ".*", ".*")}
REVOKED = credential("two", is_revoked=True)


@pytest.mark.parametrize(
    ("rows", "users", "rights", "wanted"),
    [
        pytest.param([ONE, TWO], BOTH, RIGHTS, Changes(), id="all is as it should be"),
        pytest.param([ONE], {}, {}, Changes(make=(ONE,)), id="missing"),
        pytest.param([ONE], BOTH | {"qcr_one": "old"}, {}, Changes(make=(ONE,)), id="another password"),
        pytest.param([ONE], BOTH, {}, Changes(allow=(ONE,)), id="no rights"),
        pytest.param([ONE], BOTH, {"qcr_one": Rights("^$", ".*", ".*")}, Changes(allow=(ONE,)), id="too many rights"),
        pytest.param([ONE], BOTH, RIGHTS, Changes(delete=("qcr_two",)), id="not known"),
        pytest.param([ONE, REVOKED], BOTH, RIGHTS, Changes(delete=("qcr_two",)), id="revoked"),
        pytest.param([ONE, REVOKED], {"qcr_one": "h"}, {"qcr_one": ONE.rights}, Changes(), id="revoked and gone"),
        pytest.param([], BOTH, {}, Changes(), id="another installation's users are left alone"),
    ],
)  # fmt: skip
def test_the_broker_gets_the_users_that_the_table_has(
    rows: list[Credential], users: dict[str, str], rights: dict[str, Rights], wanted: Changes
) -> None:
    assert plan(rows, users, rights) == wanted


def test_a_result_too_large_for_a_message_says_where_it_is() -> None:
    def told(size: int) -> dict[str, Any]:
        due = DueResult("batch_1", 1, "m", "q", "a", "succeeded", "req_1", 200, b'"' + b"x" * size + b'"')
        answer = result(due)
        assert len(answer.body) <= MAX_MESSAGE_BYTES
        return dict(json.loads(answer.body))

    assert told(1000)["result"]["response"]["status_code"] == 200
    large = told(MAX_MESSAGE_BYTES)
    assert large["result"]["error"]["code"] == "result_too_large" and large["result"]["custom_id"] == "a"
    assert "batch_1" in large["result"]["error"]["message"]
