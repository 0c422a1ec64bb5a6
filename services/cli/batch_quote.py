"""A quote in words and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from services.cli.output import print_fields, print_table

_BASES = {
    "batches": "measured while it ran batches",
    "requests": "measured in its best hour of requests",
    "unknown": "never measured: time and cost are not known",
}


def show_quote(made: Mapping[str, Any]) -> None:
    """Print a quote that is ready."""
    quoted, counted = made["quote"], made["quote"]["counted"]
    fields = [
        ("quote", made["quote_id"]),
        ("model", quoted["model"]),
        ("lines", f"{counted['lines']} lines, {counted['refused_lines']} of them would be refused"),
        ("prompts", f"{counted['prompt_tokens']} tokens, counted"),
        ("answers", answers_in_words(counted)),
        ("by the token", "no price" if quoted["tokens"] is None else f"{quoted['tokens']['cost_usd']} USD"),
    ]
    fields += [(option["option"], option_in_words(option)) for option in quoted["resources"]]
    print_fields(fields)
    print_table(("option", "gpus", "over in", "minutes", "USD", ""), _rows(quoted["resources"]))


def answers_in_words(counted: Mapping[str, Any]) -> str:
    """How many tokens, and how that is known. Pure."""
    tokens, answers = counted["completion_tokens"], counted["answers"]
    if answers["basis"] == "none":
        return "none"
    if answers["basis"] == "mean":
        how = f"{answers['mean_tokens']:.1f} each, the mean of the last {answers['requests']}"
        return f"about {tokens} tokens: {how}; {counted['completion_tokens_at_most']} at most"
    return f"{tokens} tokens at most: too few answers were seen to expect less"


def option_in_words(option: Mapping[str, Any]) -> str:
    """What is known of its GPUs. Pure."""
    pace = _BASES[option["pace_basis"]]
    if option["tokens_per_s"] is not None:
        pace = f"{option['tokens_per_s']:.1f} tokens/s a GPU, {pace}"
    free = "" if option["free_gpus"] is None else f"; {option['free_gpus']} free"
    return f"{pace}; starts in {option['start_s']:.0f} s ({option['start_basis']}){free}"


def _rows(resources: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for option in resources:
        for offer in option["offers"]:
            chosen = offer["gpus"] == option["gpus"]
            words = (
                {True: "in time", False: "too late", None: "not known"}[option["in_time"]] if chosen else ""
            )
            yield (
                option["option"],
                offer["gpus"],
                duration(offer["finish_s"]),
                "-" if offer["minutes"] is None else offer["minutes"],
                offer["cost_usd"] or "-",
                words,
            )


def own_fields(own: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A batch's own resource: what was quoted and what it came to. Pure."""
    if own is None:
        return []
    fields = [("own resource", f"{own['state']}, {own['gpus']} of {own['option']}")]
    for name in ("quoted", "real"):
        found = own[name]
        if found is not None:
            cost = "-" if found["cost_usd"] is None else found["cost_usd"]
            minutes = "-" if found["minutes"] is None else found["minutes"]
            fields.append((name, f"over in {duration(found['finish_s'])}, {minutes} minutes, {cost} USD"))
    return fields


def duration(seconds: int | None) -> str:
    """Hours, minutes and seconds. Pure."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
