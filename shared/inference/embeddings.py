"""`/v1/embeddings`: its body as a table of fields, its jobs, and its answer. Pure."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shared.inference.jobs import JobContext, shared_fields
from shared.inference.parameters import MODEL
from shared.inference.prompts import Prompt, Prompts
from shared.inference.responses import Head, encode
from shared.inference.rules import (
    Field,
    IntegerIn,
    OneOf,
    Only,
    Schema,
    Text,
    by_name,
    object_schema,
    parse_fields,
)
from shared.messages import EmbedJob

MAX_INPUTS = 256
JOB_INPUTS = 64
"""Inputs of one job: what its worker sends back at once stays within a message, and other workers share the rest."""

MAX_DIMENSIONS = 65_536


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """What the client wants. dimensions: None is all that the model has."""

    model: str
    inputs: tuple[Prompt, ...]
    encoding: Literal["float", "base64"]
    pooling: Literal["mean", "last"]
    dimensions: int | None

    @property
    def operation(self) -> Literal["embeddings"]:
        return "embeddings"

    def named_tokens(self) -> Iterator[tuple[str, Sequence[int]]]:
        """All token ids that the client named, by field."""
        for each in self.inputs:
            if not isinstance(each, str):
                yield "input", each


_POOLING = OneOf(
    ("mean", "last"),
    "How a text becomes one vector: the mean of its tokens' final hidden states, or the last token's alone.",
)
_DIMENSIONS = "So many of the vector's first values, made of length 1 again."
EMBEDDING_FIELDS = by_name(
    MODEL,
    Field("input", Prompts(MAX_INPUTS), required=True),
    Field("encoding_format", OneOf(("float", "base64")), "float"),
    Field("dimensions", IntegerIn(1, MAX_DIMENSIONS, _DIMENSIONS)),
    Field("pooling", _POOLING, "mean"),
    # Changes nothing here, so any good value is taken.
    Field("user", Text(0, 512)),
    # vLLM's extras that are not built.
    Field("add_special_tokens", Only((True,))),
    Field("normalize", Only((True,))),
    Field("priority", Only((0,))),
    Field("truncate_prompt_tokens", Only()),
)


def embedding_schema() -> Schema:
    return object_schema(EMBEDDING_FIELDS.values())


def parse_embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Read the body of `/v1/embeddings`. Raises ApiError 400."""
    values = parse_fields(body, EMBEDDING_FIELDS)
    return EmbeddingRequest(
        model=values["model"],
        inputs=values["input"],
        encoding=values["encoding_format"],
        pooling=values["pooling"],
        dimensions=values["dimensions"],
    )


def build_embed_jobs(
    wanted: EmbeddingRequest,
    inputs: Sequence[Sequence[int]],
    context: JobContext,
    new_job_id: Callable[[], str],
) -> list[EmbedJob]:
    """As many jobs as the inputs need at `JOB_INPUTS` each, in order."""
    shared = shared_fields(context)
    return [
        EmbedJob(
            **shared,
            job_id=new_job_id(),
            operation=wanted.operation,
            inputs=[list(tokens) for tokens in inputs[start : start + JOB_INPUTS]],
            pooling=wanted.pooling,
            dimensions=wanted.dimensions,
        )
        for start in range(0, len(inputs), JOB_INPUTS)
    ]


def embedding_parts(
    head: Head, vectors: Sequence[bytes], encoding: Literal["float", "base64"], usage: Mapping[str, Any]
) -> Iterator[bytes]:
    """The answer in pieces, at most one vector in each: a whole one may hold a million numbers.

    vectors: little-endian fp32, which is what base64 gives out as it is. usage: of a generation without an answer.
    """
    shown = _numbers if encoding == "float" else _base64
    yield b'{"object":"list","data":['
    for index, vector in enumerate(vectors):
        entry = encode({"object": "embedding", "index": index, "embedding": shown(vector)})
        yield b"," + entry if index else entry
    counts = {name: count for name, count in usage.items() if name != "completion_tokens"}
    yield b'],"model":' + encode(head.model) + b',"usage":' + encode(counts) + b"}"


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _numbers(vector: bytes) -> list[float]:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
