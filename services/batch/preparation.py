"""From a line's bytes to its jobs, by the same rules as a live request: fields, vocabulary, tokens, context.

A line that the endpoint would refuse is refused here, with the same answer; it fails alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from services.batch.input_lines import read_body
from services.batch.records import Batch
from shared import strict_json
from shared.ids import new_id
from shared.inference.checks import (
    check_inputs,
    check_vocabulary,
    choose_max_tokens,
    context_tokens,
)
from shared.inference.embeddings import EmbeddingRequest, build_embed_jobs, parse_embedding
from shared.inference.errors import ApiError, bad_request
from shared.inference.jobs import JobContext, build_jobs
from shared.inference.parameters import GenerationRequest, parse_chat, parse_completion
from shared.inference.principal import ModelView, Principal, Route
from shared.inference.prompts import ChatMessage, Prompt
from shared.messages import EmbedJob, GenerateJob, JobQueueMessage

DEFAULT_CHAT_MAX_TOKENS = 1024
"""For a chat that names no limit; the same as over HTTP."""
GROUP_LINES = 32
GROUP_BYTES = 128 * 1024
"""Of lines that go to a tokenizer in one question: it has as long for them as for one long prompt."""


class Tokenizers(Protocol):
    """What of `tokenizers_pool.TokenizerPool` is used here; all raise ApiError."""

    async def encode_texts(self, folder: str, texts: Sequence[str]) -> list[list[int]]: ...

    async def encode_words(self, folder: str, words: Sequence[str]) -> list[list[int]]: ...

    async def encode_chats(
        self, folder: str, conversations: Sequence[Sequence[ChatMessage]]
    ) -> list[list[int]]: ...

    async def decode(self, folder: str, token_lists: Sequence[Sequence[int]]) -> list[str]: ...

    async def spellings(self, folder: str, tokens: Iterable[int]) -> Mapping[int, bytes]: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A line that can go out."""

    batch: Batch
    line: int
    request_id: str
    wanted: GenerationRequest | EmbeddingRequest
    prompt_texts: Sequence[str]
    """Empty without echo."""
    jobs: Sequence[JobQueueMessage]
    model: ModelView

    @property
    def resource_id(self) -> str:
        return self.jobs[0].resource_id

    @property
    def prompt_tokens(self) -> int:
        return sum(job.input_token_count for job in self.jobs)

    @property
    def cost_tokens(self) -> int:
        """The most that it may take."""
        answers = sum(job.max_tokens * job.choices for job in self.jobs if isinstance(job, GenerateJob))
        return self.prompt_tokens + answers

    @property
    def prefix(self) -> Sequence[int]:
        job = self.jobs[0]
        return job.inputs[0] if isinstance(job, EmbedJob) else job.prompt_tokens


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that the endpoint refuses."""

    line: int
    request_id: str
    error: ApiError


@dataclass(slots=True)
class _Parsed:
    """A line that was read; `inputs` and `texts` come with its tokens."""

    line: int
    request_id: str
    wanted: GenerationRequest | EmbeddingRequest
    inputs: list[Sequence[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class Preparer:
    """Lines come in groups: most of what a short line would cost by itself is the way to the tokenizer and back."""

    def __init__(self, tokenizers: Tokenizers, owner_queue: str) -> None:
        self._tokenizers = tokenizers
        self._owner_queue = owner_queue

    async def prepare(
        self, batch: Batch, model: ModelView, route: Route, lines: Sequence[tuple[int, bytes]]
    ) -> list[Prepared | Refused]:
        """Prepare lines, given by number and text, in their order.

        Raises ApiError 503 when the tokenizers are busy: to be tried again.
        """
        found: list[Prepared | Refused] = []
        for group in cut_groups(lines):
            parsed = [self._parse(batch, model, line, content) for line, content in group]
            await self._tokenize([each for each in parsed if isinstance(each, _Parsed)], model, found)
            refused = {each.line: each for each in found if isinstance(each, Refused)}
            for each in parsed:
                if isinstance(each, Refused):
                    found.append(each)
                elif each.line not in refused:
                    found.append(self._finish(batch, model, route, each))
        return found

    def _parse(self, batch: Batch, model: ModelView, line: int, content: bytes) -> _Parsed | Refused:
        request_id = new_id("req")
        try:
            body = strict_json.loads(read_body(content))
            wanted: GenerationRequest | EmbeddingRequest
            if batch.endpoint == "/v1/embeddings":
                wanted = parse_embedding(body)
            elif batch.endpoint == "/v1/chat/completions":
                wanted = parse_chat(body, random_seed=line_seed(batch.batch_id, line))
            else:
                wanted = parse_completion(body, random_seed=line_seed(batch.batch_id, line))
            if isinstance(wanted, GenerationRequest) and wanted.stream:
                raise bad_request("unsupported_parameter", "A line of a batch cannot be streamed.", "stream")
            check_vocabulary(wanted, model.vocab_size)
        except (
            msgspec.DecodeError,
            UnicodeDecodeError,
        ):  # it was good when the file was checked: the storage gave other bytes
            return Refused(line, request_id, bad_request("invalid_json_line", "The line cannot be read."))
        except ApiError as error:
            return Refused(line, request_id, error)
        return _Parsed(line, request_id, wanted)

    async def _tokenize(
        self, lines: Sequence[_Parsed], model: ModelView, found: list[Prepared | Refused]
    ) -> None:
        """Give the lines their tokens, all at once; if one is refused, one by one. Those refused go to `found`."""
        try:
            await self._tokenize_together(lines, model)
        except ApiError as error:
            if error.status >= 500:
                raise
            for each in lines:
                try:
                    await self._tokenize_together([each], model)
                except ApiError as own:
                    if own.status >= 500:
                        raise
                    found.append(Refused(each.line, each.request_id, own))

    async def _tokenize_together(self, lines: Sequence[_Parsed], model: ModelView) -> None:
        folder = model.tokenizer_folder
        chats = [each for each in lines if each.wanted.operation == "chat"]
        if chats:
            token_lists = await self._tokenizers.encode_chats(
                folder, [each.wanted.messages for each in chats if isinstance(each.wanted, GenerationRequest)]
            )
            for each, tokens in zip(chats, token_lists, strict=True):
                each.inputs = [tokens]
        others = [each for each in lines if each.wanted.operation != "chat"]
        texts = [text for each in others for text in _prompts(each) if isinstance(text, str)]
        encoded = iter(await self._tokenizers.encode_texts(folder, texts) if texts else [])
        for each in others:
            each.inputs = [next(encoded) if isinstance(prompt, str) else prompt for prompt in _prompts(each)]
        for each in lines:
            wanted = each.wanted
            if isinstance(wanted, GenerationRequest) and wanted.echo:
                each.texts = [prompt for prompt in wanted.prompts if isinstance(prompt, str)]
                each.texts = each.texts or await self._tokenizers.decode(folder, each.inputs)
            if isinstance(wanted, GenerationRequest) and wanted.bad_words:
                words = await self._tokenizers.encode_words(folder, wanted.bad_words)
                each.wanted = wanted.with_bad_words(words)

    def _finish(self, batch: Batch, model: ModelView, route: Route, line: _Parsed) -> Prepared | Refused:
        now_ms = time.time_ns() // 1_000_000
        context = JobContext(
            request_id=line.request_id,
            principal=Principal(batch.key_id, batch.team_id, "", False, False, frozenset()),
            model=model,
            route=route,
            owner_queue=self._owner_queue,
            accepted_unix_ms=now_ms,
            deadline_s=batch.expires_at.timestamp() - now_ms / 1000,
            work_class="batch",
        )
        room, next_id, wanted = context_tokens(model, route), _Ids(new_id("job")), line.wanted
        jobs: Sequence[JobQueueMessage]
        try:
            if isinstance(wanted, EmbeddingRequest):
                check_inputs(line.inputs, room)
                jobs = build_embed_jobs(wanted, line.inputs, context, next_id)
            else:
                max_tokens = choose_max_tokens(wanted, line.inputs, room, DEFAULT_CHAT_MAX_TOKENS)
                jobs = build_jobs(wanted, line.inputs, max_tokens, context, next_id)
        except ApiError as error:
            return Refused(line.line, line.request_id, error)
        return Prepared(batch, line.line, line.request_id, wanted, line.texts, jobs, model)


def cut_groups(lines: Sequence[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """The lines in groups of a bounded number and size; a line over the size is a group by itself. Pure."""
    groups: list[list[tuple[int, bytes]]] = []
    size = 0
    for line in lines:
        if not groups or len(groups[-1]) >= GROUP_LINES or size + len(line[1]) > GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(line)
        size += len(line[1])
    return groups


def _prompts(line: _Parsed) -> Sequence[Prompt]:
    wanted = line.wanted
    return wanted.inputs if isinstance(wanted, EmbeddingRequest) else wanted.prompts


def line_seed(batch_id: str, line: int) -> int:
    """The seed of a line that names none: the same each time that the line runs, so that a second run answers alike."""
    return int.from_bytes(hashlib.sha256(f"{batch_id}/{line}".encode()).digest()[:8]) >> 1


class _Ids:
    def __init__(self, first: str) -> None:
        self._first = first
        self._given = 0

    def __call__(self) -> str:
        self._given += 1
        return job_id_at(self._first, self._given - 1)


def job_id_at(first: str, index: int) -> str:
    """The id of a line's job by its place: they follow one another, so that a row holds the first alone."""
    prefix, _, digits = first.partition("_")
    return f"{prefix}_{int(digits, 16) + index:032x}"
