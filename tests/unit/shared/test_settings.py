"""Settings: read once, checked all together, no secret shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shared.settings import CommonSettings, SettingsError, env, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    name: str = env("NAME")
    count: int = env("COUNT", 3, low=1, high=10)
    share: float = env("SHARE", 0.5, low=0.0, high=1.0)
    size: int = env("SIZE", 5)
    switch: bool = env("SWITCH", False)
    folder: Path = env("FOLDER", Path("/srv"))  # noqa: RUF009 - field declarations
    note: str | None = env("NOTE", None)
    place: Path | None = env("PLACE", None)  # noqa: RUF009
    password: str = env("PASSWORD", "", secret=True)
    not_from_outside: int = 42


def loaded(**environment: str) -> Example:
    return load(Example, {"NAME": "x"} | environment)


def problems(**environment: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(Example, {"NAME": "x"} | environment)
    return str(refused.value).splitlines()


def test_defaults_hold_when_nothing_is_set() -> None:
    assert loaded() == Example(name="x")


@pytest.mark.parametrize(
    ("variable", "raw", "field", "value"),
    [
        ("COUNT", "1", "count", 1),
        ("COUNT", "10", "count", 10),
        ("COUNT", " 7 ", "count", 7),
        ("SIZE", "-5", "size", -5),
        ("SHARE", "0", "share", 0.0),
        ("SHARE", "1e-3", "share", 0.001),
        ("SWITCH", "TRUE", "switch", True),
        ("SWITCH", "on", "switch", True),
        ("SWITCH", "1", "switch", True),
        ("SWITCH", "No", "switch", False),
        ("SWITCH", "0", "switch", False),
        ("SWITCH", "", "switch", False),
        ("FOLDER", "/data", "folder", Path("/data")),
        ("NOTE", "hello", "note", "hello"),
        ("PLACE", "/data", "place", Path("/data")),
    ],
)
def test_a_good_value_is_taken(variable: str, raw: str, field: str, value: Any) -> None:
    assert getattr(loaded(**{variable: raw}), field) == value


@pytest.mark.parametrize(
    ("variable", "raw", "problem"),
    [
        ("COUNT", "", "COUNT is not a valid int"),
        ("COUNT", "many", "COUNT is not a valid int"),
        ("COUNT", "1.5", "COUNT is not a valid int"),
        ("COUNT", "0", "COUNT must be between 1 and 10"),
        ("COUNT", "11", "COUNT must be between 1 and 10"),
        ("SHARE", "half", "SHARE is not a valid float"),
        ("SHARE", "nan", "SHARE must be between 0.0 and 1.0"),
        ("SHARE", "inf", "SHARE must be between 0.0 and 1.0"),
        ("SHARE", "-0.01", "SHARE must be between 0.0 and 1.0"),
        ("SWITCH", "maybe", "SWITCH is not a valid bool"),
    ],
)
def test_a_bad_value_is_named(variable: str, raw: str, problem: str) -> None:
    assert problems(**{variable: raw}) == [problem]


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(SettingsError) as refused:
        load(Example, {"COUNT": "x", "SHARE": "7", "SWITCH": "?", "PASSWORD_FILE": "/no/such/file"})
    assert [line.split()[0] for line in str(refused.value).splitlines()] == [
        "NAME",
        "COUNT",
        "SHARE",
        "SWITCH",
        "PASSWORD",
    ]


@pytest.mark.parametrize("raw", ["999999", "secret-word"])
def test_a_bad_value_itself_is_not_repeated(raw: str) -> None:
    assert raw not in "\n".join(problems(COUNT=raw)), "it may be a password in the wrong variable"


def test_a_field_without_a_variable_is_not_read() -> None:
    assert loaded(NOT_FROM_OUTSIDE="1", not_from_outside="1").not_from_outside == 42


# ---- X_FILE


def test_a_value_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("correct horse\n")
    assert loaded(PASSWORD_FILE=str(tmp_path / "password")).password == "correct horse"


def test_a_number_from_a_file_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("99\n")
    assert problems(COUNT_FILE=str(tmp_path / "count")) == ["COUNT must be between 1 and 10"]


def test_a_required_value_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("filed")
    assert load(Example, {"NAME_FILE": str(tmp_path / "name")}).name == "filed"


def test_the_variable_itself_goes_before_its_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("filed")
    assert loaded(PASSWORD="direct", PASSWORD_FILE=str(tmp_path / "password")).password == "direct"


def test_a_file_that_is_missing_is_a_problem_and_not_a_default(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    assert problems(PASSWORD_FILE=str(path)) == [
        f"PASSWORD cannot be read from {path}: No such file or directory"
    ]


def test_a_folder_or_rubbish_in_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_bytes(b"\xff\xfe\x00")
    assert problems(PASSWORD_FILE=str(tmp_path))[0].startswith("PASSWORD cannot be read from")
    assert problems(PASSWORD_FILE=str(tmp_path / "rubbish"))[0].startswith("PASSWORD ")


# ---- secrets, and values


def test_a_secret_is_not_in_the_repr() -> None:
    example = loaded(PASSWORD="correct horse")
    assert example.password == "correct horse"
    assert "correct horse" not in repr(example)
    assert "correct horse" not in f"{example}"


def test_the_broker_s_url_is_a_secret() -> None:
    common = load(CommonSettings, {"AMQP_URL": "amqp://user:pass-word@host/", "OPS_PORT": "0"})
    assert "pass-word" not in repr(common)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded().name = "other"  # type: ignore[misc]


def test_the_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "from outside")
    assert load(Example).name == "from outside"


@pytest.mark.parametrize("raw", ["CHATTY", "", "10"])
def test_a_log_level_that_does_not_exist_is_a_problem(raw: str) -> None:
    with pytest.raises(SettingsError, match="LOG_LEVEL"):
        load(CommonSettings, {"AMQP_URL": "amqp://h/", "OPS_PORT": "0", "LOG_LEVEL": raw})


@pytest.mark.parametrize("raw", ["info", "DEBUG", "Warning"])
def test_a_log_level_may_be_spelled_in_any_case(raw: str) -> None:
    common = load(CommonSettings, {"AMQP_URL": "amqp://h/", "OPS_PORT": "0", "LOG_LEVEL": raw})
    assert common.log_level in ("INFO", "DEBUG", "WARNING")
