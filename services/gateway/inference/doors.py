"""The three doors to generation, each with the shape of its stream and of its whole answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.inference.frames import ChatFrames, CompletionFrames, Frames, VendorFrames
from services.gateway.inference.generation import Generation
from shared.inference.parameters import GenerationRequest
from shared.inference.responses import (
    Choice,
    Echo,
    Head,
    Spellings,
    chat_body,
    completion_body,
    vendor_body,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """All of a request's choices, prompt by prompt, and what they took."""

    choices: Sequence[Choice]
    generation: Generation
    prompts: Sequence[Sequence[int]]
    prompt_texts: Sequence[str]
    """Empty without echo."""
    spellings: Spellings | None
    """None without log-probabilities."""


class Door(Protocol):
    def frames(
        self, head: Head, wanted: GenerationRequest, prompt_texts: Sequence[str], choices: int
    ) -> Frames: ...

    def body(self, head: Head, answer: Answer) -> bytes: ...


class ChatDoor:
    def frames(
        self, head: Head, wanted: GenerationRequest, prompt_texts: Sequence[str], choices: int
    ) -> Frames:
        del prompt_texts
        return ChatFrames(
            head,
            choices,
            include_usage=wanted.include_usage,
            with_logprobs=wanted.sampling.logprobs is not None,
        )

    def body(self, head: Head, answer: Answer) -> bytes:
        return chat_body(head, answer.choices, answer.generation.usage(), spellings=answer.spellings)


class CompletionDoor:
    def frames(
        self, head: Head, wanted: GenerationRequest, prompt_texts: Sequence[str], choices: int
    ) -> Frames:
        echoes = [text for text in prompt_texts for _ in range(wanted.n)] or [""] * choices
        return CompletionFrames(
            head,
            echoes,
            include_usage=wanted.include_usage,
            with_logprobs=wanted.sampling.logprobs is not None,
        )

    def body(self, head: Head, answer: Answer) -> bytes:
        usage = answer.generation.usage()
        return completion_body(
            head, answer.choices, usage, spellings=answer.spellings, echoes=_echoes(answer)
        )


class VendorDoor:
    """The per-model URL."""

    def frames(
        self, head: Head, wanted: GenerationRequest, prompt_texts: Sequence[str], choices: int
    ) -> Frames:
        del head, wanted, choices
        return VendorFrames(prompt_texts[0] if prompt_texts else "")

    def body(self, head: Head, answer: Answer) -> bytes:
        return vendor_body(
            answer.choices, head.created_unix_s, spellings=answer.spellings, echoes=_echoes(answer)
        )


def _echoes(answer: Answer) -> list[Echo | None]:
    if not answer.prompt_texts:
        return [None] * len(answer.choices)
    choices_per_prompt = len(answer.choices) // len(answer.prompts)
    return [
        Echo(text, tokens[0], end.prompt_logprobs if end is not None else ())
        for text, tokens, end in zip(
            answer.prompt_texts, answer.prompts, answer.generation.finished, strict=True
        )
        for _ in range(choices_per_prompt)
    ]
