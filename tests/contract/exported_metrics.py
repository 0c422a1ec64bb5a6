"""What the services export to Prometheus, read from their code: each `create_*` call, and every string in it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry

from shared import telemetry

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("services", "shared")
_CREATE = re.compile(
    r"create_(counter|histogram|gauge|up_down_counter|observable_(?:counter|gauge|up_down_counter))"
)


class UnreadableCall(Exception):
    """A metric is created in a way that these tests cannot follow."""


@functools.cache
def instruments() -> frozenset[tuple[str, str, str]]:
    """(kind, name, unit) of every metric in the code."""
    found = set()
    for path, tree in _modules():
        constants = _string_constants(tree)
        for call in _calls(tree):
            kind = _CREATE.fullmatch(call.func.attr) if isinstance(call.func, ast.Attribute) else None
            if kind is None:
                continue
            units = [word.value for word in call.keywords if word.arg == "unit"]
            unit = _text(units[0], constants, path) if units else ""
            for name in _given_as(call.args[0], tree):
                found.add((kind[1], _text(name, constants, path), unit))
    return frozenset(found)


@functools.cache
def exported() -> frozenset[str]:
    """The names on `/metrics`, made by the real exporter from one value of each instrument."""
    registry = CollectorRegistry()
    reader = PrometheusMetricReader(registry=registry)
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    meter = provider.get_meter("roundhouse")

    def observe(_options: CallbackOptions) -> Iterator[Observation]:
        yield Observation(1)

    for kind, name, unit in instruments():
        if kind.startswith("observable"):
            getattr(meter, f"create_{kind}")(name, [observe], unit=unit)
        else:
            made = getattr(meter, f"create_{kind}")(name, unit=unit)
            getattr(made, {"histogram": "record", "gauge": "set"}.get(kind, "add"))(1)
    names = frozenset(sample.name for metric in registry.collect() for sample in metric.samples)
    provider.shutdown()
    return names


@functools.cache
def strings() -> frozenset[str]:
    """Every string in the code: labels' names and values are among them."""
    return frozenset(
        node.value
        for _, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _given_as(name: ast.expr, tree: ast.Module) -> list[ast.expr]:
    """What `name` stands for: itself, or if it is a parameter, what the module's calls of that function give for it."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        parameters = [parameter.arg for parameter in function.args.args]
        if isinstance(name, ast.Name) and name.id in parameters and name in ast.walk(function):
            position = parameters.index(name.id)
            return [
                call.args[position]
                for call in _calls(tree)
                if isinstance(call.func, ast.Name) and call.func.id == function.name
            ]
    return [name]


def _string_constants(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _text(node: ast.expr, constants: dict[str, str], path: Path) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "telemetry":
        return str(getattr(telemetry, node.attr))
    raise UnreadableCall(
        f"{path}:{node.lineno}: write the metric's name as a constant of this module or of telemetry"
    )
