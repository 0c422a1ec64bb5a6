"""Values and stand-ins for the tests of inference: an owner that is driven by hand, behind the real edge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.gateway.edge import EdgeLimits, build_app, build_runner
from services.gateway.inference.http import Budgets, InferenceDeps, InferenceLimits, routes
from services.gateway.inference.measures import InferenceMetrics
from services.gateway.inference.streams import StreamTimes
from services.gateway.owner import AbandonReason, Finished, OwnedStream, Owner, TextDelta
from shared import telemetry
from shared.budgets.gate import Reservation
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView, Principal, ResourceView, Route
from shared.inference.prompts import ChatMessage
from shared.inference.tokenization import LoadedTokenizer, load_tokenizer
from shared.messages import GenerateJob, JobQueueMessage, Timings, TokenLogprob
from shared.ownership import OwnedJob
from shared.topology import Queue

KEY = "sk-rh-0123456789abcdefghijklmnopqrstuvwxyz0123456"
EOS, BOS, END_OF_TURN = 256, 257, 258
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_principal(**changes: Any) -> Principal:
    scopes = frozenset({"inference"})
    return replace(Principal("key_1", "team_1", "acme", False, False, scopes), **changes)


def make_model(**changes: Any) -> ModelView:
    model = ModelView(
        model_id="mod_1",
        team_id="team_1",
        team_slug="acme",
        name="tiny",
        revision=3,
        folder="mod_1/3",
        signature="abc",
        model_type="tiny-type",
        context_tokens=4096,
        vocab_size=259,
        eos_token_ids=(EOS,),
        created_unix_s=1_700_000_000,
    )
    return replace(model, **changes)


def make_route(**changes: Any) -> Route:
    resource = ResourceView(
        resource_id="res_1",
        team_id="team_1",
        model_type="tiny-type",
        pool=False,
        wanted="on",
        state="live",
        live_count=1,
        max_context_tokens=2048,
        expected_live_unix_s=None,
        created_unix_s=0.0,
    )
    return Route(replace(resource, **changes), "resource")


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """A byte-level tokenizer: token i is byte-character i of the GPT-2 table's order, then <s>, </s>-like control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|eos|>", "<|bos|>", "<|end|>")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "bos_token": "<|bos|>",
        "eos_token": {"content": "<|eos|>"},
        "chat_template": TEMPLATE,
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


class InProcessTokenizers:
    """The pool's interface without its processes."""

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedTokenizer = load_tokenizer(write_tokenizer(folder))

    async def encode_texts(self, folder: str, texts: Sequence[str]) -> list[list[int]]:
        return [self.loaded.encode_text(text) for text in texts]

    async def encode_words(self, folder: str, words: Sequence[str]) -> list[list[int]]:
        return [ids for word in words for ids in self.loaded.encode_word(word)]

    async def encode_chat(self, folder: str, messages: Sequence[ChatMessage]) -> list[int]:
        return self.loaded.encode_chat([{"role": m.role, "content": m.content} for m in messages])

    async def encode_chats(
        self, folder: str, conversations: Sequence[Sequence[ChatMessage]]
    ) -> list[list[int]]:
        return [await self.encode_chat(folder, messages) for messages in conversations]

    async def decode(self, folder: str, token_lists: Sequence[Sequence[int]]) -> list[str]:
        return [self.loaded.decode(tokens) for tokens in token_lists]

    async def spellings(self, folder: str, tokens: Iterable[int]) -> Mapping[int, bytes]:
        return {token: self.loaded.spell(token) for token in tokens}


class FakeOwner:
    """Runs `script(job, stream)` for each job. Streams are the real ones; what they void is kept in `voided`."""

    queue = "replies.v1.gw_test"

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: list[Any] = []
        self.voided: list[tuple[str, AbandonReason, int]] = []
        self.was_voided = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def submit(self, job: JobQueueMessage, queue: Queue) -> OwnedStream:
        # Its clock and its claims are not looked at here.
        owned = OwnedJob(job, deadline_s=1e9, now_s=0.0)
        stream = OwnedStream(cast(Owner, self), owned, queue)
        self.jobs.append(job)
        self._tasks.append(asyncio.create_task(self.script(job, stream)))
        return stream

    async def abandon(self, stream: OwnedStream, reason: AbandonReason, delivered_tokens: int) -> None:
        self.voided.append((stream.owned.job.job_id, reason, delivered_tokens))
        self.was_voided.set()


Script = Callable[[Any, OwnedStream], Coroutine[Any, Any, None]]


def delta(
    text: str, choice: int = 0, finish: str | None = None, *, job: GenerateJob | None = None
) -> TextDelta:
    """One token per character; with a job that asks for them, log-probabilities as well."""
    tokens = tuple(ord(char) - 33 if 33 <= ord(char) < 127 else 0 for char in text)
    wanted = None if job is None else job.sampling.logprobs
    logprobs: tuple[TokenLogprob, ...] = ()
    if wanted is not None:
        logprobs = tuple(
            TokenLogprob(token=token, logprob=-0.5, top=[(token + i, -0.5 - i) for i in range(wanted)])
            for token in tokens
        )
    return TextDelta(choice, text, tokens, logprobs, finish)


def finished(
    tokens: int, *reasons: str, outcome: str = "succeeded", code: str | None = None, **more: Any
) -> Finished:
    timings = Timings(queue_ms=1.0, swap_ms=2.0, prefill_ms=3.0, decode_ms=4.0)
    return Finished(outcome, code, None, tokens, reasons, timings, more.get("prompt_logprobs", ()))


async def say_hello(job: GenerateJob, stream: OwnedStream) -> None:
    """Each choice says "Hello!" in two pieces."""
    for choice in range(job.choices):
        stream.push(delta("Hel", choice, job=job))
    await asyncio.sleep(0)
    for choice in range(job.choices):
        stream.push(delta("lo!", choice, "stop", job=job))
    stream.push(finished(6 * job.choices, *["stop"] * job.choices))


class OneModel:
    def __init__(self, model: ModelView, route: Route | ApiError) -> None:
        self.model = model
        self.route = route

    def find_model(self, principal: Principal, name: str) -> ModelView:
        if name not in (self.model.full_name, self.model.name):
            raise ApiError(404, "model_not_found", "The model does not exist.", param="model")
        return self.model

    def resolve(self, principal: Principal, name: str) -> tuple[ModelView, Route]:
        model = self.find_model(principal, name)
        if isinstance(self.route, ApiError):
            raise self.route
        return model, self.route

    def list_models(self, principal: Principal) -> list[ModelView]:
        return [self.model]


class OpenGate:
    @asynccontextmanager
    async def admitted(self, principal: Principal) -> AsyncIterator[dict[str, str]]:
        yield {"x-ratelimit-limit-requests": "400"}


class NoCaps:
    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Reservation:
        return Reservation(jobs)


class OneKey:
    async def principal_for(self, secret: str) -> Principal | None:
        return make_principal() if secret == KEY else None


@asynccontextmanager
async def serving(
    owner: FakeOwner,
    folder: Path,
    *,
    route: Route | ApiError | None = None,
    model: ModelView | None = None,
    times: StreamTimes | None = None,
    budgets: Budgets | None = None,
) -> AsyncIterator[str]:
    """The base URL of a gateway that has the real edge and the real routes of inference."""
    deps = InferenceDeps(
        models=OneModel(model or make_model(), route or make_route()),
        tokenizers=InProcessTokenizers(folder),
        gate=OpenGate(),
        budgets=budgets or NoCaps(),
        owner=owner,
        metrics=InferenceMetrics(telemetry.meter()),
        limits=InferenceLimits(default_chat_max_tokens=100, stream=times or StreamTimes()),
    )
    runner = build_runner(build_app(routes(deps), OneKey(), EdgeLimits()), drain_timeout_s=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
