"""`roundhouse bench`: latency and requests a minute of a GPU, measured on one's own model and request size."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from services.cli.acting import api, find_id
from services.cli.bench_report import Level, best_rpm_per_gpu, level_json, read_levels
from services.cli.client import ApiClient, CliError
from services.cli.output import Json, print_fields, print_json, print_table

RESOURCES = "/api/resources"
TICK_S = 0.1
TOKENS = range(3, 250)
"""Ids that every vocabulary has. They are drawn anew for each prompt, so that no prefix cache has read it before."""


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the resource's first.")] = None,
    resource: Annotated[
        str | None, typer.Option(help="Name or id; default: the one that the model runs on.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Of each request.")] = 300,
    completion_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Of each answer, exactly.")] = 30,
    concurrency: Annotated[
        str, typer.Option(help="How many requests at once, level after level.")
    ] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=1, max=600, help="How long each level sends requests.")] = 10,
    as_json: Json = False,
) -> None:
    """Send requests of one size, more and more at once: how long they take, and how many a minute a GPU does.

    They are ordinary requests, and are paid as such.
    """
    client = api(context)
    try:
        levels = read_levels(concurrency)
    except ValueError as error:
        raise CliError(str(error)) from error
    found = _resource_of(client, resource, model)
    named = model or (found["models"][0]["name"] if found and found["models"] else None)
    if named is None:
        raise CliError("name a model with --model")
    gpus = found["live_gpus"] if found else None
    body = {"model": named, "max_tokens": completion_tokens, "ignore_eos": True, "temperature": 0}
    ran, refused = _run(client, body, prompt_tokens, levels, seconds)
    measured = [level_json(level, gpus) for level in ran]
    answer = {
        "model": named,
        "resource_id": found["resource_id"] if found else None,
        "live_gpus": gpus,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "levels": measured,
        "requests_per_minute_per_gpu": best_rpm_per_gpu(measured),
        "refused": refused,
    }
    if as_json:
        print_json(answer)
        return
    _show(answer)


def _show(answer: dict[str, Any]) -> None:
    print_table(
        ("at once", "requests", "p50 ms", "p95 ms", "requests/min", "requests/min/GPU"),
        (
            (
                each["concurrency"], each["requests"], each["latency_ms"]["p50"], each["latency_ms"]["p95"],
                each["requests_per_minute"], each["requests_per_minute_per_gpu"],
            )
            for each in answer["levels"]
        ),
    )  # fmt: skip
    best = answer["requests_per_minute_per_gpu"]
    print_fields(
        [
            ("model", answer["model"]),
            ("GPUs", answer["live_gpus"]),
            *([("refused", answer["refused"])] if answer["refused"] else []),
            ("one GPU", "unknown on shared GPUs" if best is None else f"{best:g} requests a minute"),
        ]
    )


def _resource_of(client: ApiClient, resource: str | None, model: str | None) -> dict[str, Any] | None:
    """The team's resource that requests go to; None for shared GPUs. One that would not get them is refused."""
    every = sorted(client.list(RESOURCES), key=lambda each: (each["created_at"], each["resource_id"]))
    every = [each for each in every if not each["pool"]]
    if resource is not None:
        wanted = find_id(client, RESOURCES, "resource_id", resource)
        found = client.get(f"{RESOURCES}/{wanted}")
        first = next((each for each in every if each["model_type"] == found["model_type"]), found)
        if not found["pool"] and first["resource_id"] != found["resource_id"]:
            raise CliError(f"'{first['name']}' gets the requests of this model type, not '{found['name']}'")
        if model is not None and all(each["name"] != model for each in found["models"]):
            raise CliError(f"'{model}' does not run on '{found['name']}'")
    else:
        on = [each for each in every if any(known["name"] == model for known in each["models"])]
        if not on:
            return None
        found = on[0]
    if not found["live_gpus"]:
        raise CliError(f"'{found['name']}' is {found['state']}: turn it on first")
    return found


def _run(
    client: ApiClient, body: dict[str, Any], prompt_tokens: int, levels: list[int], seconds: float
) -> tuple[list[Level], str | None]:
    """Run level after level, after one request that has the model loaded; the bar is drawn on standard error.

    Returns the levels, and what the server said to the one that it refused, with which it ends.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    measured: list[Level] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("warming up", total=len(levels) * seconds)
        _ask(client, body, prompt_tokens)
        for number, concurrency in enumerate(levels):
            bar.update(task, description=f"{concurrency} at once", completed=number * seconds)
            try:
                measured.append(
                    _run_level(
                        lambda: _ask(client, body, prompt_tokens),
                        concurrency,
                        seconds,
                        lambda: bar.advance(task, TICK_S),
                    )
                )
            except CliError as error:
                if not measured:
                    raise
                return measured, f"with {concurrency} at once: {error}"
    return measured, None


def _run_level(ask: Callable[[], float], concurrency: int, seconds: float, tick: Callable[[], None]) -> Level:
    """Keep so many requests in the air for so long, and wait for the last. Raises the first refusal."""
    stop = threading.Event()
    began_s = time.monotonic()

    def keep_asking() -> list[float]:
        latencies_ms: list[float] = []
        try:
            while not latencies_ms or not (stop.is_set() or time.monotonic() - began_s >= seconds):
                latencies_ms.append(ask())
        except CliError:
            stop.set()
            raise
        return latencies_ms

    with ThreadPoolExecutor(concurrency) as threads:
        asking = [threads.submit(keep_asking) for _ in range(concurrency)]
        while time.monotonic() - began_s < seconds and not stop.wait(TICK_S):
            tick()
        latencies_ms = [each for thread in asking for each in thread.result()]
    return Level(concurrency, time.monotonic() - began_s, latencies_ms)


def _ask(client: ApiClient, body: dict[str, Any], prompt_tokens: int) -> float:
    """Ask once; return how long it took in milliseconds. Raises `CliError` for an answer of another size."""
    prompt = random.choices(TOKENS, k=prompt_tokens)
    began_s = time.monotonic()
    usage = client.post("/v1/completions", {**body, "prompt": prompt})["usage"]
    took_ms = (time.monotonic() - began_s) * 1000
    if (usage["prompt_tokens"], usage["completion_tokens"]) != (prompt_tokens, body["max_tokens"]):
        raise CliError(
            f"an answer had {usage['completion_tokens']} tokens to a prompt of {usage['prompt_tokens']}: not what was asked"
        )
    return took_ms
