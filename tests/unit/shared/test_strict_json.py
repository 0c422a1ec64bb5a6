from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import strict_json
from shared.inference.errors import ApiError

REFUSED = [
    (b"", "invalid_json", None),
    (b"   \n", "invalid_json", None),
    (b'{"a": 1', "invalid_json", None),
    (b'{"a": 1} x', "invalid_json", None),
    (b"{}{}", "invalid_json", None),
    (b"[]", "invalid_json", None),
    (b'"text"', "invalid_json", None),
    (b"null", "invalid_json", None),
    (b"5", "invalid_json", None),
    (b"{'a': 1}", "invalid_json", None),
    (b'{"a": "tab\there"}', "invalid_json", None),
    (b"[" * 100_000, "json_too_deep", None),
    (b'{"a":' * 33 + b"1" + b"}" * 33, "json_too_deep", None),
    (b'{"a": [' + b"[]," * 20_000 + b"0]}", "json_too_complex", None),
    (b'{"a": NaN}', "invalid_json", "a"),
    (b'{"a": {"b": [1, Infinity]}}', "invalid_json", "a.b[1]"),
    (b'{"a": -Infinity}', "invalid_json", "a"),
    (b'{"temperature": 1e999}', "number_out_of_range", "temperature"),
    (b'{"a": [-1e999]}', "number_out_of_range", "a[0]"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "number_out_of_range", "seed"),
    (b'{"a": 1, "a": 2}', "duplicate_key", None),
    (b'{"o": {"a": 1, "\\u0061": 2}}', "duplicate_key", "o"),
    (b'{"a": "\xff"}', "invalid_encoding", None),
    ('{"a": 1}'.encode("utf-16"), "invalid_encoding", None),
    (b"\xef\xbb\xbf{}", "invalid_encoding", None),
    (b'{"a": "\xed\xa0\x80"}', "invalid_encoding", None),
    (b'{"a": "\\ud800"}', "invalid_unicode", "a"),
    (b'{"messages": [{"content": "x\\udc00y"}]}', "invalid_unicode", "messages[0].content"),
    (b'{"a": "\\u0000"}', "invalid_unicode", "a"),
    (b'{"\\u0000": 1}', "invalid_unicode", None),
    (b'{"o": {"\\ud800": 1}}', "invalid_unicode", "o"),
]


@pytest.mark.parametrize(("body", "code", "param"), REFUSED, ids=[str(row[0][:24]) for row in REFUSED])
def test_a_body_is_refused_with_a_code_and_its_place(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        strict_json.loads(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"{}", {}),
        (b' {"a": [1, 2.5, -3, true, null, "\\ud83d\\ude00"]} ', {"a": [1, 2.5, -3, True, None, "😀"]}),
        (b'{"a": 18446744073709551615}', {"a": 2**64 - 1}),
        (b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}', {"a": "[" * 46}),
        (b'{"a": "\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}', {"a": '"' + "[" * 40}),
        (b'{"a": [' + b"[]," * 19_990 + b"0]}", None),
        (b'{"a":' * 31 + b"{}" + b"}" * 31, None),
    ],
)
def test_a_sound_body_is_accepted(body: bytes, value: object) -> None:
    assert strict_json.loads(body) == (json.loads(body) if value is None else value)


@pytest.mark.parametrize(
    "body",
    [
        b'"' + b'\\"' * 500_000,
        b'"' * 1_000_000,
        b"[]," * 300_000,
        b"\\" * 1_000_000,
        b'{"' + b"a" * 1_000_000,
    ],
    ids=["escaped quotes", "quotes", "empty lists", "backslashes", "open key"],
)
def test_a_hostile_megabyte_is_answered_quickly(body: bytes) -> None:
    started_s = time.process_time()
    with pytest.raises(ApiError):
        strict_json.loads(body)
    assert time.process_time() - started_s < 0.5


@given(st.binary(max_size=200))
def test_any_bytes_give_an_object_or_a_refusal(body: bytes) -> None:
    try:
        value = strict_json.loads(body)
    except ApiError as error:
        assert error.status == 400
    else:
        assert isinstance(value, dict)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="ascii", exclude_characters="\x00")), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(codec="ascii", exclude_characters="\x00")), values, max_size=5))
def test_what_json_writes_is_read_back(value: dict[str, object]) -> None:
    assert strict_json.loads(json.dumps(value).encode()) == value
