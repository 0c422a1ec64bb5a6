"""The pool of tokenizer processes: bounded in number, queue and time, so that no text and no template can hold up its service.

Each child is owned by one task that alone talks to it, loads models into it and replaces it when it dies or takes too long.
All tasks take from one bounded queue. Knows nothing of HTTP but the refusals it raises.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from shared.inference.errors import ApiError, bad_request
from shared.inference.prompts import ChatMessage
from shared.inference.tokenizer_protocol import (
    CONTROL_TOKEN,
    LENGTH,
    MAX_FRAME_BYTES,
    NO_CHAT_TEMPLATE,
    NO_TOKENS,
    TEMPLATE_REFUSED,
    TOKENIZER_FAILED,
    Answer,
    AnyQuestion,
    Decode,
    Done,
    EncodeChat,
    EncodeChats,
    EncodeTexts,
    EncodeWords,
    Load,
    Refused,
    Spellings,
    SpellTokens,
    Texts,
    Tokens,
    Unload,
    answer_decoder,
    frame,
)

log = structlog.get_logger()

PROJECT_ROOT = Path(__file__).resolve().parents[2]
BUSY_RETRY_S = 1
RESPAWN_PAUSE_S = 0.5
SPELLED_MODELS = 8

_Query = EncodeTexts | EncodeWords | EncodeChat | EncodeChats | Decode | SpellTokens


@dataclass(frozen=True, slots=True)
class PoolLimits:
    children: int = 2
    # A child that holds SmolLM2's tokenizer has 70 MB; the largest public ones take some 250 MB each to load.
    memory_bytes: int = 2 * 1024**3
    models_per_child: int = 8
    # Typical is 0.1 ms; 1 MiB of text takes about 0.5 s.
    call_s: float = 2.0
    load_s: float = 20.0
    waiting: int = 256
    # Who waited longer than this would rather try again.
    wait_s: float = 5.0


class _Lost(Exception):
    """The child died or took too long on a question."""


@dataclass(slots=True)
class _Work:
    question: _Query
    answer: asyncio.Future[Answer]
    since_s: float = field(default_factory=time.monotonic)


class TokenizerPool:
    def __init__(self, store: Path, limits: PoolLimits | None = None) -> None:
        self._store = store
        self._limits = limits or PoolLimits()
        # None wakes a child up to look at the models it should load.
        self._work: asyncio.Queue[_Work | None] = asyncio.Queue()
        # A vocabulary is finite, so a table only grows to its size (about 10 MB for the largest).
        self._spellings: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        self.children = [_Child(store, self._limits) for _ in range(self._limits.children)]

    def start(self, group: asyncio.TaskGroup) -> None:
        """Run the children in `group`; they end with it."""
        for child in self.children:
            group.create_task(self._own(child))

    def prewarm(self, folders: Iterable[str]) -> None:
        """Have the models loaded soon in every child, so that their first request does not wait for it."""
        wanted = list(folders)[-self._limits.models_per_child :]
        for child in self.children:
            child.to_warm = wanted
            self._work.put_nowait(None)

    async def encode_texts(self, folder: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Raises ApiError."""
        answer = await self._ask(EncodeTexts(folder, list(texts)), "prompt")
        assert isinstance(answer, Tokens)
        return answer.token_lists

    async def encode_words(self, folder: str, words: Sequence[str]) -> list[list[int]]:
        """Token ids of each spelling of each word within a text. Raises ApiError."""
        answer = await self._ask(EncodeWords(folder, list(words)), "bad_words")
        assert isinstance(answer, Tokens)
        return answer.token_lists

    async def encode_chat(self, folder: str, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of the conversation in the model's template. Raises ApiError."""
        answer = await self._ask(EncodeChat(folder, _plain(messages)), "messages")
        assert isinstance(answer, Tokens)
        return answer.token_lists[0]

    async def encode_chats(
        self, folder: str, conversations: Sequence[Sequence[ChatMessage]]
    ) -> list[list[int]]:
        """The same for many at once. Raises ApiError if one of them is refused, without saying which."""
        plain = [_plain(messages) for messages in conversations]
        answer = await self._ask(EncodeChats(folder, plain), "messages")
        assert isinstance(answer, Tokens)
        return answer.token_lists

    async def decode(self, folder: str, token_lists: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of token ids, control tokens by their names. Raises ApiError."""
        answer = await self._ask(Decode(folder, [list(tokens) for tokens in token_lists]), "prompt")
        assert isinstance(answer, Texts)
        return answer.texts

    async def spellings(self, folder: str, tokens: Iterable[int]) -> Mapping[int, bytes]:
        """A table with at least these tokens: the bytes each stands for. Raises ApiError."""
        table = self._spellings.setdefault(folder, {})
        self._spellings.move_to_end(folder)
        missing = list({token for token in tokens if token not in table})
        if missing:
            answer = await self._ask(SpellTokens(folder, missing), "logprobs")
            assert isinstance(answer, Spellings)
            table.update(zip(missing, answer.spellings, strict=True))
            while len(self._spellings) > SPELLED_MODELS:
                self._spellings.popitem(last=False)
        return table

    async def _ask(self, question: _Query, param: str) -> Answer:
        if self._work.qsize() >= self._limits.waiting:
            raise _busy()
        work = _Work(question, asyncio.get_running_loop().create_future())
        self._work.put_nowait(work)
        answer = await work.answer
        if isinstance(answer, Refused):
            raise _refusal(answer, param)
        return answer

    async def _own(self, child: _Child) -> None:
        try:
            await child.ensure_running()
            while True:
                work = await self._work.get()
                await self._warm(child)
                if work is not None and not work.answer.done():
                    await self._run(child, work)
        finally:
            await child.stop()

    async def _run(self, child: _Child, work: _Work) -> None:
        if time.monotonic() - work.since_s > self._limits.wait_s:
            work.answer.set_exception(_busy())
            return
        failure: ApiError
        try:
            answer = await child.ask(work.question)
        except TimeoutError:
            log.warning("tokenizer_timeout", folder=work.question.folder, limit_s=self._limits.call_s)
            failure = bad_request("prompt_too_complex", "The prompt takes too long to tokenize.", "prompt")
        except (_Lost, OSError) as error:
            log.error("tokenizer_child_lost", folder=work.question.folder, error=str(error))
            failure = _busy()
        else:
            if not work.answer.done():  # the caller may have gone meanwhile
                work.answer.set_result(answer)
            return
        if not work.answer.done():
            work.answer.set_exception(failure)
        await self._replace(child)

    async def _warm(self, child: _Child) -> None:
        folders, child.to_warm = child.to_warm, []
        for folder in folders:
            try:
                refused = await child.ensure_loaded(folder)
            except (TimeoutError, _Lost, OSError) as error:
                log.error("tokenizer_prewarm_failed", folder=folder, error=f"{type(error).__name__}: {error}")
                await self._replace(child)
            else:
                if refused is not None:
                    log.error("tokenizer_unreadable", folder=folder, error=refused.message)

    async def _replace(self, child: _Child) -> None:
        await child.stop()
        try:
            await child.ensure_running()
        except OSError as error:
            # Tried again with the next question; the pause keeps a machine without memory or processes from spinning.
            log.error("tokenizer_child_not_started", error=str(error))
            await asyncio.sleep(RESPAWN_PAUSE_S)


class _Child:
    """One process and what is loaded in it. Used by one task only."""

    def __init__(self, store: Path, limits: PoolLimits) -> None:
        self._store = store
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self.to_warm: list[str] = []

    def has_loaded(self, folder: str) -> bool:
        return folder in self._loaded

    async def ensure_running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            self._loaded.clear()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "shared.inference.tokenizer_child",
                str(self._store),
                str(int(self._limits.load_s)),
                str(self._limits.memory_bytes),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Its last words might quote a prompt; the exit status says enough.
                stderr=asyncio.subprocess.DEVNULL,
                cwd=PROJECT_ROOT,
                # Nothing of the gateway's environment: there are passwords in it.
                env={
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "RAYON_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        return self._process

    async def ask(self, question: _Query) -> Answer:
        """Raises TimeoutError, _Lost or OSError; the child is of no more use then."""
        refused = await self.ensure_loaded(question.folder)
        return refused or await self._exchange(question, self._limits.call_s)

    async def ensure_loaded(self, folder: str) -> Refused | None:
        if folder in self._loaded:
            self._loaded.move_to_end(folder)
            return None
        while len(self._loaded) >= self._limits.models_per_child:
            oldest, _ = self._loaded.popitem(last=False)
            await self._exchange(Unload(oldest), self._limits.call_s)
        answer = await self._exchange(Load(folder), self._limits.load_s)
        if isinstance(answer, Refused):
            return answer
        assert isinstance(answer, Done)
        self._loaded[folder] = None
        return None

    async def _exchange(self, question: AnyQuestion, limit_s: float) -> Answer:
        process = await self.ensure_running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                process.stdin.write(frame(question))
                await process.stdin.drain()
                (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
                if size > MAX_FRAME_BYTES:
                    raise _Lost(f"an answer of {size} bytes")
                answer: Answer = answer_decoder.decode(await process.stdout.readexactly(size))
                return answer
        except asyncio.IncompleteReadError as error:
            raise _Lost(f"exit status {await self.stop()}") from error

    async def stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            process.kill()
        return await process.wait()


def _plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {}) for m in messages]


def _busy() -> ApiError:
    return ApiError(
        503, "service_unavailable", "The tokenizer is busy; try again.", retry_after_s=BUSY_RETRY_S
    )


def _refusal(refused: Refused, param: str) -> ApiError:
    if refused.code == NO_CHAT_TEMPLATE:
        return bad_request(
            "chat_template_missing", "This model has no chat template; use /v1/completions.", "model"
        )
    if refused.code == TEMPLATE_REFUSED:
        return bad_request(
            "invalid_messages", f"The model's chat template refused the messages: {refused.message}", param
        )
    if refused.code == TOKENIZER_FAILED:
        return bad_request("prompt_too_complex", f"The model's tokenizer cannot read the {param}.", param)
    if refused.code in (CONTROL_TOKEN, NO_TOKENS):
        return bad_request("invalid_value", f"{param} cannot be encoded as text: {refused.message}.", param)
    log.error("tokenizer_unreadable", code=refused.code, error=refused.message)
    return ApiError(503, "service_unavailable", "The model's tokenizer cannot be loaded.", retry_after_s=30)
