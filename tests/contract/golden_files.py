"""The committed wire form of every message: an example and the schema. `python -m tests.contract.golden_files` rewrites.

Rewriting is right for a compatible change only (a new message, a new field with a default). A field that goes away,
becomes required or means something else needs a new tag, since old and new processes meet during an upgrade.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from shared.messages import Message, encode, type_of
from tests.contract.examples import EXAMPLES, WORKER_SPEC

FOLDER = Path(__file__).parent / "golden"
WORKER_SPEC_FILE = "worker_spec"
"""Not a message, but it crosses processes as well: the agent hands it to the worker as an argument."""


def wire_form(example: Message) -> dict[str, Any]:
    return {"example": json.loads(encode(example)), "schema": _schema(type(example))}


def worker_spec_form() -> dict[str, Any]:
    return {"example": json.loads(msgspec.json.encode(WORKER_SPEC)), "schema": _schema(type(WORKER_SPEC))}


def golden(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def all_forms() -> dict[str, dict[str, Any]]:
    """Every golden file's name (without suffix) and content, as the code has them now."""
    forms = {type_of(example): wire_form(example) for example in EXAMPLES}
    return forms | {WORKER_SPEC_FILE: worker_spec_form()}


def _schema(kind: type) -> Any:
    return _without_words(msgspec.json.schema(kind))


def _without_words(schema: Any) -> Any:
    """The schema without docstrings, which may change freely."""
    if isinstance(schema, dict):
        return {
            key: _without_words(value)
            for key, value in schema.items()
            # A property may be called "description" too: then its value is a schema.
            if key != "description" or not isinstance(value, str)
        }
    return [_without_words(each) for each in schema] if isinstance(schema, list) else schema


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    forms = all_forms()
    for path in FOLDER.glob("*.json"):
        if path.stem not in forms:
            path.unlink()
    for name, form in forms.items():
        text = json.dumps(form, indent=1, ensure_ascii=False, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
