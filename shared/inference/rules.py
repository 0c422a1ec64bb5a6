"""What a field of a request body may hold: each rule checks a JSON value and describes itself as JSON Schema.

Pure. A rule is the only place where its limits are written: parsing, the OpenAPI document and the tests read them from here.
Values come from strict JSON (no NaN, no duplicate keys, no lone surrogates); `param` is the path that a refusal names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shared.inference.errors import ApiError, bad_request

Schema = dict[str, Any]


class Rule(Protocol):
    def parse(self, value: Any, param: str) -> Any:
        """Return the value as the handlers use it. Raises ApiError 400 that names `param`."""

    def schema(self) -> Schema: ...


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body. Absent and null both mean `default`, as OpenAI has it, except where the field is required."""

    name: str
    rule: Rule
    default: Any = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class IntegerIn:
    low: int
    high: int
    description: str = ""

    def parse(self, value: Any, param: str) -> int:
        if type(value) is not int:  # a bool is an int to isinstance, and 5.0 is not one to anybody
            raise invalid_type(param, "an integer")
        if not self.low <= value <= self.high:
            raise invalid_value(param, f"must be between {self.low} and {self.high}")
        return value

    def schema(self) -> Schema:
        described = {"description": self.description} if self.description else {}
        return {"type": "integer", "minimum": self.low, "maximum": self.high, **described}


@dataclass(frozen=True, slots=True)
class NumberIn:
    low: float
    high: float
    low_excluded: bool = False

    def parse(self, value: Any, param: str) -> float:
        if type(value) is not int and type(value) is not float:
            raise invalid_type(param, "a number")
        # Compared before the conversion: an integer may be too large for a float. NaN fails every comparison.
        if not self.low <= value <= self.high or (self.low_excluded and value == self.low):
            edge = (
                f"above {self.low:g} and at most {self.high:g}"
                if self.low_excluded
                else f"between {self.low:g} and {self.high:g}"
            )
            raise invalid_value(param, f"must be {edge}")
        return float(value)

    def schema(self) -> Schema:
        return {
            "type": "number",
            "exclusiveMinimum" if self.low_excluded else "minimum": self.low,
            "maximum": self.high,
        }


@dataclass(frozen=True, slots=True)
class Flag:
    def parse(self, value: Any, param: str) -> bool:
        if type(value) is not bool:
            raise invalid_type(param, "true or false")
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    min_chars: int
    max_chars: int

    def parse(self, value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise invalid_type(param, "a string")
        if not self.min_chars <= len(value) <= self.max_chars:
            raise invalid_value(param, f"must have {self.min_chars} to {self.max_chars} characters")
        return value

    def schema(self) -> Schema:
        return {"type": "string", "minLength": self.min_chars, "maxLength": self.max_chars}


@dataclass(frozen=True, slots=True)
class Only:
    """A field that is not built: values that change nothing are accepted, any other is refused as unsupported."""

    values: tuple[Any, ...] = ()

    def parse(self, value: Any, param: str) -> None:
        # Types are compared too: to Python true equals 1.
        if not any(type(value) is type(allowed) and value == allowed for allowed in self.values):
            raise unsupported(param)

    def schema(self) -> Schema:
        return {
            "enum": [*self.values, None],
            "description": "Not supported; only values that change nothing are accepted.",
        }


@dataclass(frozen=True, slots=True)
class OneOf:
    values: tuple[str, ...]
    description: str = ""

    def parse(self, value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise invalid_type(param, "a string")
        if value not in self.values:
            raise invalid_value(param, f"must be one of {', '.join(self.values)}")
        return value

    def schema(self) -> Schema:
        described = {"description": self.description} if self.description else {}
        return {"type": ["string", "null"], "enum": [*self.values, None], **described}


@dataclass(frozen=True, slots=True)
class Strings:
    """One string or a list of them; parsed to a tuple."""

    max_items: int
    item: Text
    description: str = ""

    def parse(self, value: Any, param: str) -> tuple[str, ...]:
        if isinstance(value, str):
            return (self.item.parse(value, param),)
        if not isinstance(value, list):
            raise invalid_type(param, "a string or a list of strings")
        if len(value) > self.max_items:
            raise invalid_value(param, f"may hold at most {self.max_items} strings")
        return tuple(self.item.parse(item, f"{param}[{index}]") for index, item in enumerate(value))

    def schema(self) -> Schema:
        several = {"type": "array", "items": self.item.schema(), "maxItems": self.max_items}
        described = {"description": self.description} if self.description else {}
        return {"anyOf": [self.item.schema(), several], **described}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids below the vocabulary's size are checked once the model is known."""

    max_items: int
    item: IntegerIn

    def parse(self, value: Any, param: str) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise invalid_type(param, "a list of token ids")
        if len(value) > self.max_items:
            raise invalid_value(param, f"may hold at most {self.max_items} token ids")
        return tuple(self.item.parse(item, f"{param}[{index}]") for index, item in enumerate(value))

    def schema(self) -> Schema:
        return {"type": "array", "items": self.item.schema(), "maxItems": self.max_items}


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Token id (as text, JSON has no other keys) to addend; parsed to pairs."""

    max_entries: int
    bias: NumberIn
    _id_pattern = "^(0|[1-9][0-9]{0,8})$"

    def parse(self, value: Any, param: str) -> list[tuple[int, float]]:
        if not isinstance(value, dict):
            raise invalid_type(param, "an object of token ids and numbers")
        if len(value) > self.max_entries:
            raise invalid_value(param, f"may hold at most {self.max_entries} entries")
        pairs = []
        for key, bias in value.items():
            # Of several spellings of an id only the shortest is taken: no id can stand twice.
            if not (key.isascii() and key.isdigit() and len(key) <= 9 and (key == "0" or key[0] != "0")):
                raise invalid_value(param, "has a key that is not a token id")
            pairs.append((int(key), self.bias.parse(bias, f"{param}.{key}")))
        return pairs

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"pattern": self._id_pattern},
            "additionalProperties": self.bias.schema(),
            "maxProperties": self.max_entries,
        }


@dataclass(frozen=True, slots=True)
class Metadata:
    """Checked as OpenAI checks it, and then dropped: nothing here stores requests."""

    max_pairs: int = 16
    max_key_chars: int = 64
    max_value_chars: int = 512

    def parse(self, value: Any, param: str) -> None:
        if not isinstance(value, dict):
            raise invalid_type(param, "an object of strings")
        if len(value) > self.max_pairs:
            raise bad_request("invalid_metadata", f"{param} may hold at most {self.max_pairs} pairs.", param)
        for key, text in value.items():
            if not 1 <= len(key) <= self.max_key_chars:
                raise bad_request(
                    "invalid_metadata",
                    f"Keys of {param} must have 1 to {self.max_key_chars} characters.",
                    param,
                )
            if not isinstance(text, str) or len(text) > self.max_value_chars:
                message = f"Values of {param} must be strings of at most {self.max_value_chars} characters."
                raise bad_request("invalid_metadata", message, param)

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"minLength": 1, "maxLength": self.max_key_chars},
            "additionalProperties": {"type": "string", "maxLength": self.max_value_chars},
            "maxProperties": self.max_pairs,
        }


@dataclass(frozen=True, slots=True)
class ObjectOf:
    """A nested object with fields of its own; parsed to a dict with every field's value."""

    fields: tuple[Field, ...]

    def parse(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise invalid_type(param, "an object")
        return parse_fields(value, {field.name: field for field in self.fields}, f"{param}.")

    def schema(self) -> Schema:
        return object_schema(self.fields)


def parse_fields(body: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """Every field's value by name, defaults included. Raises ApiError 400.

    1. A name that is not in the table -> unknown_parameter.
    2. A required field that is absent or null -> missing_parameter.
    3. Absent or null -> the default.
    4. Otherwise what the field's rule says.
    """
    for name in body:
        if name not in fields:  # 1
            raise bad_request(
                "unknown_parameter", f"Unknown parameter: {prefix}{shown(name)}.", f"{prefix}{shown(name)}"
            )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        given = body.get(name)
        if given is None:
            if field.required:  # 2
                raise bad_request("missing_parameter", f"{prefix}{name} is required.", f"{prefix}{name}")
            values[name] = field.default  # 3
        else:
            values[name] = field.rule.parse(given, f"{prefix}{name}")  # 4
    return values


def by_name(*fields: Field) -> dict[str, Field]:
    return {field.name: field for field in fields}


def object_schema(fields: Iterable[Field]) -> Schema:
    properties: Schema = {}
    required = []
    for field in fields:
        schema = field.rule.schema()
        if field.required:
            required.append(field.name)
        elif "enum" not in schema:
            schema = {"anyOf": [schema, {"type": "null"}]}
        # What is parsed to something else than it is written as (stop strings, pairs) has no default worth showing.
        if isinstance(field.default, bool | int | float | str):
            schema["default"] = field.default
        properties[field.name] = schema
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def invalid_type(param: str, wanted: str) -> ApiError:
    return bad_request("invalid_type", f"{param} must be {wanted}.", param)


def invalid_value(param: str, problem: str) -> ApiError:
    return bad_request("invalid_value", f"{param} {problem}.", param)


def unsupported(param: str) -> ApiError:
    return bad_request("unsupported_parameter", f"{param} is not supported with this value.", param)


def shown(name: str) -> str:
    """A client's own name for a field, short and printable enough to repeat."""
    return "".join(c if c.isprintable() else "?" for c in name[:64])
