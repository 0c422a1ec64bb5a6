"""The routes of inference: OpenAI's `/v1`, and the per-model URL with its vendor's manners.

A handler reads the body; `_begun` finds model and route and a place in the gate; then tokens, checks, jobs, answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from services.gateway.edge import read_json
from services.gateway.inference import schemas
from services.gateway.inference.doors import Answer, ChatDoor, CompletionDoor, Door, VendorDoor
from services.gateway.inference.generation import Generation, JobOwner, Reserved
from services.gateway.inference.measures import InferenceMetrics, Measure
from services.gateway.inference.streams import EventStream, StreamTimes, stream_answer
from services.gateway.owner import Finished
from services.gateway.routes import INFERENCE, RESPONSE_HEADERS, RouteSpec, principal_of, request_id_of
from shared import telemetry, topology
from shared.ids import new_id
from shared.inference import parameters
from shared.inference.checks import (
    NamesTokens,
    check_inputs,
    check_vocabulary,
    choose_max_tokens,
    context_tokens,
    refusal_of,
)
from shared.inference.embeddings import (
    build_embed_jobs,
    embedding_parts,
    embedding_schema,
    parse_embedding,
)
from shared.inference.errors import ApiError
from shared.inference.jobs import JobContext, build_jobs
from shared.inference.parameters import GenerationRequest
from shared.inference.principal import ModelView, Principal, Route
from shared.inference.prompts import ChatMessage, Prompt
from shared.inference.responses import Choice, Head, Spellings, encode, model_entry, tokens_in
from shared.messages import JobQueueMessage


class ModelTable(Protocol):
    """What of `route_table.RouteTable` is used here; all raise ApiError."""

    def find_model(self, principal: Principal, name: str) -> ModelView: ...

    def resolve(self, principal: Principal, name: str) -> tuple[ModelView, Route]: ...

    def list_models(self, principal: Principal) -> list[ModelView]: ...


class Tokenizers(Protocol):
    """What of `tokenizers_pool.TokenizerPool` is used here; all raise ApiError."""

    async def encode_texts(self, folder: str, texts: Sequence[str]) -> list[list[int]]: ...

    async def encode_words(self, folder: str, words: Sequence[str]) -> list[list[int]]: ...

    async def encode_chat(self, folder: str, messages: Sequence[ChatMessage]) -> list[int]: ...

    async def decode(self, folder: str, token_lists: Sequence[Sequence[int]]) -> list[str]: ...

    async def spellings(self, folder: str, tokens: Iterable[int]) -> Mapping[int, bytes]: ...


class Gate(Protocol):
    def admitted(self, principal: Principal) -> AbstractAsyncContextManager[dict[str, str]]:
        """A place for one request, and the headers that tell the rate. Raises ApiError."""


class Budgets(Protocol):
    """What of `shared.budgets.gate.BudgetGate` is used here."""

    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Reserved:
        """Reserve what the jobs may cost, until it is known which of them run. Raises ApiError."""


@dataclass(frozen=True, slots=True)
class InferenceLimits:
    # Under the openai package's own 600 s, so that we are the ones who say how it ended.
    deadline_s: float = 300.0
    # For a chat that names no limit: it would otherwise run on to the end of the context.
    default_chat_max_tokens: int = 1024
    stream: StreamTimes = field(default_factory=StreamTimes)


@dataclass(frozen=True, slots=True)
class InferenceDeps:
    models: ModelTable
    tokenizers: Tokenizers
    gate: Gate
    budgets: Budgets
    owner: JobOwner
    metrics: InferenceMetrics
    limits: InferenceLimits = field(default_factory=InferenceLimits)
    now_unix_s: Callable[[], float] = time.time


def routes(deps: InferenceDeps) -> list[RouteSpec]:
    handlers = _Handlers(deps)

    def spec(method: str, path: str, handler: Any, summary: str, **more: Any) -> RouteSpec:
        more = {"error_shape": "openai", "scope": INFERENCE, "tag": "inference", **more}
        return RouteSpec(method=method, path=path, handler=handler, summary=summary, **more)

    return [
        spec("GET", "/v1/models", handlers.list_models, "The models that this key may use.",
             responses={200: schemas.MODEL_LIST}),
        spec("GET", "/v1/models/{model:.+}", handlers.get_model, "One model.", responses={200: schemas.MODEL}),
        spec("POST", "/v1/completions", handlers.create_completion, "Continue a prompt.",
             request_schema=parameters.completion_schema(), responses={200: schemas.COMPLETION}),
        spec("POST", "/v1/chat/completions", handlers.create_chat_completion, "Answer a conversation.",
             request_schema=parameters.chat_schema(), responses={200: schemas.CHAT_COMPLETION}),
        spec("POST", "/v1/embeddings", handlers.create_embeddings, "Turn texts into vectors.",
             request_schema=embedding_schema(), responses={200: schemas.EMBEDDINGS}),
        spec("POST", "/models/{team}/{model}/completions", handlers.create_vendor_completion,
             "Continue a prompt, at the model's own URL.", error_shape="vendor",
             request_schema=parameters.vendor_schema(), responses={200: schemas.VENDOR_COMPLETION}),
    ]  # fmt: skip


class Wanted(NamesTokens, Protocol):
    """What every parsed body has."""

    @property
    def model(self) -> str: ...

    @property
    def operation(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Begun:
    """A request that was let in."""

    context: JobContext
    head: Head
    measure: Measure


class _Handlers:
    def __init__(self, deps: InferenceDeps) -> None:
        self._deps = deps

    async def list_models(self, request: web.Request) -> web.Response:
        models = self._deps.models.list_models(principal_of(request))
        return _json(encode({"object": "list", "data": [_entry(model) for model in models]}))

    async def get_model(self, request: web.Request) -> web.Response:
        model = self._deps.models.find_model(principal_of(request), request.match_info["model"])
        return _json(encode(_entry(model)))

    async def create_completion(self, request: web.Request) -> web.StreamResponse:
        wanted = parameters.parse_completion(await read_json(request), random_seed=_random_seed())
        return await self._generate(request, wanted, CompletionDoor())

    async def create_chat_completion(self, request: web.Request) -> web.StreamResponse:
        wanted = parameters.parse_chat(await read_json(request), random_seed=_random_seed())
        return await self._generate(request, wanted, ChatDoor())

    async def create_vendor_completion(self, request: web.Request) -> web.StreamResponse:
        try:
            name = f"{request.match_info['team']}/{request.match_info['model']}"
            wanted = parameters.parse_vendor(await read_json(request), model=name, random_seed=_random_seed())
            return await self._generate(request, wanted, VendorDoor())
        except ApiError as error:
            raise vendor_error(error) from error

    async def create_embeddings(self, request: web.Request) -> web.StreamResponse:
        wanted = parse_embedding(await read_json(request))
        async with self._begun(request, wanted) as begun:
            context, measure = begun.context, begun.measure
            with telemetry.span("tokenize"):
                inputs = await self._token_ids(wanted.inputs, context.model)
            check_inputs(inputs, context_tokens(context.model, context.route))
            jobs = build_embed_jobs(wanted, inputs, context, lambda: new_id("job"))
            measure.planned(None, sum(map(len, inputs)), [job.job_id for job in jobs])
            async with await self._generation(jobs, context) as generation:
                vectors = await _collect_vectors(generation, len(inputs))
                parts = []
                for part in embedding_parts(begun.head, vectors, wanted.encoding, generation.usage()):
                    parts.append(part)
                    await asyncio.sleep(0)  # others' streams go on between two vectors
                return self._complete(generation, b"".join(parts), measure, [])

    async def _generate(
        self, request: web.Request, wanted: GenerationRequest, door: Door
    ) -> web.StreamResponse:
        async with self._begun(request, wanted) as begun:
            context, head, measure = begun.context, begun.head, begun.measure
            with telemetry.span("tokenize"):
                prompts, prompt_texts = await self._tokenize(wanted, context.model)
                if wanted.bad_words:
                    words = await self._deps.tokenizers.encode_words(
                        context.model.tokenizer_folder, wanted.bad_words
                    )
                    wanted = wanted.with_bad_words(words)
            async with await self._plan(wanted, prompts, context, measure) as generation:
                if not wanted.stream:
                    return await self._answer(head, wanted, door, generation, prompts, prompt_texts, measure)
                frames = door.frames(head, wanted, prompt_texts, len(prompts) * wanted.n)
                times = self._deps.limits.stream
                spell = (
                    None
                    if wanted.sampling.logprobs is None
                    else self._speller(context.model.tokenizer_folder)
                )
                stream = EventStream(request, times)
                return await stream_answer(stream, generation, frames, measure, times, spell)

    @asynccontextmanager
    async def _begun(self, request: web.Request, wanted: Wanted) -> AsyncIterator[_Begun]:
        """Route and place in the gate of a request, for the body of the `with`, whose end is measured. Raises ApiError."""
        accepted_unix_s = self._deps.now_unix_s()
        principal = principal_of(request)
        model, route = self._deps.models.resolve(principal, wanted.model)
        measure = Measure(self._deps.metrics, wanted.operation, principal, model, route)
        try:
            check_vocabulary(wanted, model.vocab_size)
            async with self._deps.gate.admitted(principal) as rate_headers:
                request[RESPONSE_HEADERS] = rate_headers
                context = JobContext(
                    request_id=request_id_of(request),
                    principal=principal,
                    model=model,
                    route=route,
                    owner_queue=self._deps.owner.queue,
                    accepted_unix_ms=int(accepted_unix_s * 1000),
                    deadline_s=self._deps.limits.deadline_s,
                )
                head = Head(context.request_id, int(accepted_unix_s), model.full_name, model.revision)
                yield _Begun(context, head, measure)
        except ApiError as error:
            measure.failed(error.code)
            raise
        except (asyncio.CancelledError, ConnectionError):
            measure.failed("client_gone")
            raise

    async def _tokenize(
        self, wanted: GenerationRequest, model: ModelView
    ) -> tuple[list[Sequence[int]], list[str]]:
        """Token ids of each prompt, and its text if it is to be echoed."""
        if wanted.operation == "chat":
            return [await self._deps.tokenizers.encode_chat(model.tokenizer_folder, wanted.messages)], []
        prompts = await self._token_ids(wanted.prompts, model)
        texts = [prompt for prompt in wanted.prompts if isinstance(prompt, str)]
        if wanted.echo and not texts:
            texts = await self._deps.tokenizers.decode(model.tokenizer_folder, prompts)
        return prompts, texts if wanted.echo else []

    async def _token_ids(self, prompts: Sequence[Prompt], model: ModelView) -> list[Sequence[int]]:
        """All are texts, or all are token ids already."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts:
            return list(await self._deps.tokenizers.encode_texts(model.tokenizer_folder, texts))
        return [prompt for prompt in prompts if not isinstance(prompt, str)]

    async def _plan(
        self,
        wanted: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        context: JobContext,
        measure: Measure,
    ) -> Generation:
        room = context_tokens(context.model, context.route)
        max_tokens = choose_max_tokens(wanted, prompts, room, self._deps.limits.default_chat_max_tokens)
        jobs = build_jobs(wanted, prompts, max_tokens, context, lambda: new_id("job"))
        measure.planned(max_tokens, sum(map(len, prompts)), [job.job_id for job in jobs])
        return await self._generation(jobs, context)

    async def _generation(self, jobs: Sequence[JobQueueMessage], context: JobContext) -> Generation:
        resource, team_id = context.route.resource, context.principal.team_id
        queue = topology.live_queue_for(resource.resource_id, team_id, pool=resource.pool)
        return Generation(self._deps.owner, await self._deps.budgets.reserve(jobs), queue)

    async def _answer(
        self,
        head: Head,
        wanted: GenerationRequest,
        door: Door,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        prompt_texts: Sequence[str],
        measure: Measure,
    ) -> web.Response:
        choices = await _collect(generation, len(prompts), wanted.n, measure)
        spellings: Spellings | None = None
        if wanted.sampling.logprobs is not None:
            shown = [token for choice in choices for token in tokens_in(choice.logprobs)]
            if wanted.echo:
                shown += [token for tokens in prompts for token in tokens[:1]]
                ends = [end for end in generation.finished if end is not None]
                shown += [token for end in ends for token in tokens_in(end.prompt_logprobs)]
            spellings = await self._speller(generation.jobs[0].model.tokenizer_folder)(shown)
        body = door.body(head, Answer(choices, generation, prompts, prompt_texts, spellings))
        return self._complete(generation, body, measure, [choice.finish_reason or "" for choice in choices])

    def _complete(
        self, generation: Generation, body: bytes, measure: Measure, finish_reasons: Sequence[str]
    ) -> web.Response:
        generation.complete()
        measure.succeeded(generation.prompt_tokens, generation.completion_tokens, finish_reasons)
        return _json(body, {"openai-processing-ms": str(round(measure.elapsed_s() * 1000))})

    def _speller(self, folder: str) -> Callable[[Iterable[int]], Any]:
        return lambda tokens: self._deps.tokenizers.spellings(folder, tokens)


async def _collect(generation: Generation, prompts: int, n: int, measure: Measure) -> list[Choice]:
    """Wait for the whole answer. Raises ApiError as soon as one of the jobs has failed."""
    choices = [Choice() for _ in range(prompts * n)]
    while not generation.is_over():
        for job_index, event in await generation.next_events(None):
            if isinstance(event, Finished):
                if (refusal := refusal_of(event)) is not None:
                    raise refusal
                continue
            measure.saw_tokens()
            choice = choices[job_index * n + event.choice]
            choice.text.append(event.text)
            choice.logprobs += event.logprobs
            choice.finish_reason = event.finish_reason or choice.finish_reason
    return choices


async def _collect_vectors(generation: Generation, inputs: int) -> list[bytes]:
    """Wait for all vectors, in the order of the inputs. Raises ApiError as soon as one of the jobs has failed."""
    while not generation.is_over():
        for _, event in await generation.next_events(None):
            if isinstance(event, Finished) and (refusal := refusal_of(event)) is not None:
                raise refusal
    vectors = [vector for end in generation.finished if end is not None for vector in end.embeddings]
    if len(vectors) != inputs:
        raise RuntimeError(f"{len(vectors)} vectors for {inputs} inputs")
    return vectors


def vendor_error(error: ApiError) -> ApiError:
    """The vendor's statuses where they differ from ours: out of credit is 403, a resource that is off is 404."""
    statuses = {"resource_off": 404, "no_resource": 404}
    status = 403 if error.status == 402 else statuses.get(error.code, error.status)
    return ApiError(status, error.code, error.message, param=error.param, headers=error.headers)


def _entry(model: ModelView) -> dict[str, Any]:
    return model_entry(model.full_name, model.team_slug, model.created_unix_s)


def _json(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=headers)


def _random_seed() -> int:
    return secrets.randbits(63)
