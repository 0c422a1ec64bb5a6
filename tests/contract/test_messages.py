"""Every message round-trips and equals its golden file; extra fields are ignored, missing ones refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, get_args

import msgspec
import pytest

from shared import messages
from shared.messages import Command, Job, Message, Part, decoder, encode, type_of
from tests.contract.examples import EXAMPLES, WORKER_SPEC
from tests.contract.golden_files import FOLDER, all_forms, golden

UNIONS = {
    name: set(get_args(union) or (union,))
    for name, union in {
        "JobQueueMessage": messages.JobQueueMessage,
        "ReplyMessage": messages.ReplyMessage,
        "WorkerCommand": messages.WorkerCommand,
        "NodeCommand": messages.NodeCommand,
        "UsageEvent": messages.UsageEvent,
        "PaymentFact": messages.PaymentFact,
        "FleetEvent": messages.FleetEvent,
        "SchedulerCommand": messages.SchedulerCommand,
        "BillingCommand": messages.BillingCommand,
        "Alarm": messages.Alarm,
        "BatchCommand": messages.BatchCommand,
        "BudgetQuestion": messages.BudgetQuestion,
        "BudgetAnswer": messages.BudgetAnswer,
        "BudgetEvent": messages.BudgetEvent,
    }.items()
}


def _subclasses(of: type[Any]) -> set[type[Any]]:
    """All subclasses that the module itself defines; tests may make their own."""
    direct: set[type[Any]] = {each for each in of.__subclasses__() if each.__module__ == messages.__name__}
    return direct.union(*(_subclasses(each) for each in direct))


ABSTRACT = {Message, Command, Job}
TYPES = sorted(_subclasses(Message) - ABSTRACT, key=lambda kind: kind.__name__)


def _ids(value: Any) -> str:
    return type_of(value) if isinstance(value, Message) else getattr(value, "__name__", str(value))


def _required(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind) if field.required]


def _unset(value: Any, path: str) -> list[str]:
    """Paths of all fields, at any depth, that still have their default: omitted on the wire, so not shown by it."""
    if isinstance(value, list | tuple):
        return [each for index, item in enumerate(value) for each in _unset(item, f"{path}[{index}]")]
    if not isinstance(value, msgspec.Struct):
        return []
    found = []
    for field in msgspec.structs.fields(value):
        here = f"{path}.{field.name}"
        current = getattr(value, field.name)
        if not field.required and current == _default(field):
            found.append(here)
        found += _unset(current, here)
    return found


def _default(field: msgspec.structs.FieldInfo) -> Any:
    has_factory = field.default_factory is not msgspec.NODEFAULT
    return field.default_factory() if has_factory else field.default


def test_every_message_has_exactly_one_example() -> None:
    assert Counter(type(example) for example in EXAMPLES) == Counter(TYPES)


@pytest.mark.parametrize("example", [*EXAMPLES, WORKER_SPEC], ids=_ids)
def test_an_example_sets_every_field(example: msgspec.Struct) -> None:
    assert _unset(example, type(example).__name__) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_a_message_survives_the_wire(example: Message) -> None:
    assert decoder(type(example)).decode(encode(example)) == example


@pytest.mark.parametrize("name", sorted(all_forms()))
def test_the_wire_form_is_the_golden_one(name: str) -> None:
    assert all_forms()[name] == golden(name), (
        "the wire form changed: a compatible change is written down by `python -m tests.contract.golden_files`, "
        "any other needs a new tag"
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_what_older_processes_wrote_still_means_the_same(example: Message) -> None:
    written_then = json.dumps(golden(type_of(example))["example"]).encode()
    assert decoder(type(example)).decode(written_then) == example


def test_a_model_of_a_process_that_knows_no_adapters_has_no_base() -> None:
    written = {"model_id": "m", "revision": 1, "name": "t/m", "folder": "m/1", "signature": "s"}
    ref = msgspec.convert(written, messages.ModelRef)
    assert (ref.base, ref.tokenizer_folder) == (None, "m/1")
    assert json.loads(msgspec.json.encode(ref)) == written


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(all_forms())


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_unknown_fields_are_ignored_at_any_depth(example: Message) -> None:
    def with_extra(value: Any) -> Any:
        if isinstance(value, list):
            return [with_extra(each) for each in value]
        if not isinstance(value, dict):
            return value
        # Free mappings, where every key is known, stay as they are.
        more = {key: each if key in ("body", "metadata") else with_extra(each) for key, each in value.items()}
        return more | {"of_the_future": {"a": [1]}}

    wire = with_extra(json.loads(encode(example)))
    assert decoder(type(example)).decode(json.dumps(wire).encode()) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_each_required_field_is_missed(example: Message) -> None:
    required = _required(type(example))
    assert required
    for name in required:
        wire = json.loads(encode(example))
        del wire[name]
        with pytest.raises(msgspec.ValidationError, match=f"missing required field `{name}`"):
            decoder(type(example)).decode(json.dumps(wire).encode())


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_a_field_of_the_wrong_type_is_refused(example: Message) -> None:
    for name in _required(type(example)):
        wire = json.loads(encode(example)) | {name: {"not": ["this"]}}
        with pytest.raises(msgspec.ValidationError):
            decoder(type(example)).decode(json.dumps(wire).encode())


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids)
def test_another_tag_is_refused(example: Message) -> None:
    wire = json.loads(encode(example)) | {"type": "something.else.v1"}
    with pytest.raises(msgspec.ValidationError):
        decoder(type(example)).decode(json.dumps(wire).encode())


def test_tags_are_versioned_and_unique() -> None:
    tags = [str(kind.__struct_config__.tag) for kind in TYPES]
    assert [tag for tag in tags if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+\.v[1-9][0-9]*", tag)] == []
    assert [tag for tag, count in Counter(tags).items() if count > 1] == []


@pytest.mark.parametrize("kind", TYPES, ids=_ids)
def test_every_message_belongs_to_exactly_one_conversation(kind: type) -> None:
    assert len([name for name, members in UNIONS.items() if kind in members]) == 1


@pytest.mark.parametrize("name", UNIONS)
def test_a_union_takes_its_members_and_nothing_else(name: str) -> None:
    members = UNIONS[name]
    decode = decoder(getattr(messages, name)).decode
    for example in EXAMPLES:
        if type(example) in members:
            assert decode(encode(example)) == example
        else:
            with pytest.raises(msgspec.ValidationError):
                decode(encode(example))


@pytest.mark.parametrize("kind", sorted(_subclasses(Part), key=lambda k: k.__name__) + TYPES, ids=_ids)
def test_messages_are_values(kind: type[msgspec.Struct]) -> None:
    config = kind.__struct_config__
    assert config.frozen and config.eq and config.omit_defaults and not config.forbid_unknown_fields


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"type": 3}', b'{"type": "job.drop.v1"}']
)
def test_rubbish_is_refused_with_the_errors_that_the_broker_buries_for(body: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        decoder(messages.WorkerCommand).decode(body)
