"""The generation engine: continuous batching of many sequences over resident models, one `step` at a time.

Synchronous; knows tokens, not messages. One thread calls everything but `load_model` and `load_adapter`, which may run on
others beside it. What to compute is decided in `batching.py`; this file keeps the state and does as decided.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .api import Delta, EngineConfig, EngineRefusal, ModelInfo, ModelRefusal, SequenceRequest, StepReport
from .background import StepCost, beside_others
from .batching import ModelBatch, plan_step
from .decoder import Decoder, PreparedDecoder, WeightsDamaged, kv_dtype
from .detokenize import ByteTable
from .kv_cache import KVPool
from .loading import LoadedModel, ModelLoader
from .prefix_cache import BlockAllocator
from .residents import Residents
from .running import LaunchedPass, Outcome, Work, launch, launch_isolated, may_run_ahead
from .sequence import LiveSequence, make_sequence

_PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(slots=True)
class _Round:
    """A `StepReport` in the making: of the passes that this step read."""

    deltas: list[Delta]
    prefilled: list[str] = field(default_factory=list)
    prefill_tokens: int = 0
    decode_tokens: int = 0


class Engine:
    """max_batch sequences run; further ones wait in order of arrival."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ValueError for a config that cannot work."""
        check_config(config)
        self.config = config
        self._device = torch.device(config.device)
        self._loader = ModelLoader(config, self._device)
        self._blocks = BlockAllocator(config.kv_tokens // config.block_tokens)
        self._models_lock = threading.Lock()
        self._models: dict[str, LoadedModel] = {}
        self._loading: set[str] = set()
        self._pool: KVPool | None = None
        self._residents = Residents(self._blocks, config.block_tokens, config.max_batch)
        self._finished_at_add: dict[str, LiveSequence] = {}
        self._step_tokens = config.step_tokens or config.prefill_chunk_tokens + config.max_batch
        self._in_flight: list[LaunchedPass] = []
        self._damaged: dict[str, str] = {}  # found in this step
        self._steps_ahead = config.steps_ahead
        if self._steps_ahead is None:
            self._steps_ahead = 1 if self._device.type == "cuda" else 0
        self._arrivals = 0
        self._steps = 0
        self._prompt_accounts: dict[str, int] = {}
        self._step_cost = StepCost()

    @property
    def has_work(self) -> bool:
        return bool(self._residents.running or self._residents.waiting or self._finished_at_add)

    @property
    def active_sequences(self) -> int:
        return len(self._residents.running)

    @property
    def waiting_sequences(self) -> int:
        return len(self._residents.waiting) + len(self._finished_at_add)

    @property
    def free_kv_tokens(self) -> int:
        """Room for new tokens: what is kept only in case someone asks for it again counts as free."""
        return self._blocks.free * self.config.block_tokens

    def load_model(self, handle: str, folder: Path) -> ModelInfo:
        """Seconds of work, on the calling thread, which may be another than `step`'s; ready when it returns.

        Raises ModelRefusal when the folder cannot be served, ValueError when the handle is taken.
        """
        with self._reserved(handle):
            model = self._loader.load(handle, folder)
            self._install(model)
        return model.info

    def load_image(self, handle: str, path: Path, key: str, *, ask_canary: bool) -> ModelInfo:
        """As `load_model`, from an image that `convert` made: mapped and verified, in a tenth of the time.

        ask_canary: also compare what the model says, two passes long. Raises ImageDamaged, OSError when the file is gone,
        ModelRefusal, ValueError when the handle is taken; then nothing is kept.
        """
        with self._reserved(handle):
            model = self._loader.load_image(
                handle, path, key, ask_canary=ask_canary, is_busy=lambda: self.has_work
            )
            self._install(model)
        return model.info

    def load_decoder(self, handle: str, decoder: Decoder) -> ModelInfo:
        """A model that is in memory already and has no tokenizer: its answers are tokens without text.

        Threads, readiness and errors as with `load_model`.
        """
        with self._reserved(handle):
            model = self._loader.wrap(handle, decoder, ByteTable(()))
            self._install(model)
        return model.info

    def load_adapter(self, handle: str, base_handle: str, folder: Path) -> ModelInfo:
        """A LoRA adapter in PEFT's format on a loaded base: a model of its own to requests, one pass with its base.

        Threads, readiness and errors as with `load_model`; ValueError also when the base is not loaded, or leaves meanwhile.
        weight_bytes is what the adapter adds.
        """
        with self._reserved(handle):
            with self._models_lock:
                base = self._models.get(base_handle)
            if base is None:
                raise ValueError(f"model {base_handle} is not loaded")
            model = self._loader.load_adapter(handle, base, folder)
            with self._models_lock:
                if self._models.get(base_handle) is not base:
                    raise ValueError(f"model {base_handle} was unloaded meanwhile")
                self._models[handle] = model
        return model.info

    def unload_model(self, handle: str, *, keep_prefixes: bool = False) -> None:
        """Of a model or an adapter. Raises ValueError while sequences of it live, or adapters on it are loaded, and for an
        unknown handle.

        keep_prefixes: what was computed can be found again when the handle is loaded next, as long as nobody needs the
        blocks; the caller vouches that it will be the same weights.
        """
        live = [sequence for sequence in self._live() if sequence.model.info.handle == handle]
        if live:
            raise ValueError(f"model {handle} has {len(live)} sequences")
        with self._models_lock:
            adapters = [name for name, model in self._models.items() if model.base == handle != name]
            if adapters:
                raise ValueError(f"model {handle} has adapters: {', '.join(sorted(adapters))}")
            model = self._models.pop(handle, None)
            if model is None:
                raise ValueError(f"model {handle} is not loaded")
        if not keep_prefixes:
            self._blocks.forget_model(handle)
        if model.adapter is None:
            self._loader.leave(model.decoder)

    def forget_prefixes(self) -> None:
        """What was computed until now is not found again, for no model: weights that did it are no longer trusted, and
        adapters may have stood on them.
        """
        self._blocks.forget_all()

    def add(self, request: SequenceRequest) -> None:
        """Takes the request in; it starts at a later step. Raises EngineRefusal, and then nothing was kept."""
        with self._models_lock:
            model = self._models.get(request.model)
        if model is None:
            raise EngineRefusal("unknown_model", f"model {request.model} is not loaded")
        if self._find(request.sequence_id) is not None:
            raise EngineRefusal("duplicate_sequence", f"sequence {request.sequence_id} is here already")
        check_request(request, model.info, self._blocks.count * self.config.block_tokens)
        sequence = make_sequence(request, model, self._arrivals, self.config.block_tokens)
        self._arrivals += 1
        is_done = sequence.finish_reason is not None and not sequence.needs_prompt
        if is_done:
            self._finished_at_add[request.sequence_id] = sequence
        else:
            self._residents.enqueue(sequence)

    def cancel(self, sequence_id: str) -> None:
        """Frees its place and blocks now; no further delta comes. An unknown id is a no-op."""
        self._finished_at_add.pop(sequence_id, None)
        self._residents.cancel(sequence_id)
        self._forget_unwanted_passes()

    def step(self) -> StepReport:
        """One round: starts who fits, then for each model with work one token for each answer and a piece of prompts."""
        self._set_torch_threads()
        started_s = time.perf_counter()
        with torch.inference_mode():
            report = self._step()
        if report.decode_tokens and not report.prefill_tokens:
            self._step_cost.observe(report.decode_tokens, time.perf_counter() - started_s)
        return report

    def _forget_unwanted_passes(self) -> None:
        """In flight are passes of sequences that ended, where none is left: they would keep their model's weights alive."""
        if not self._residents.running and not self._residents.waiting:
            self._in_flight = []

    def _set_torch_threads(self) -> None:
        """One beside the C kernels: more would go on spinning after each small operation, on the cores that the kernels need
        next. A decoder on plain torch takes all. Here, since torch counts for each thread apart.
        """
        if torch.get_num_threads() != self._loader.torch_threads:
            torch.set_num_threads(self._loader.torch_threads)

    def _step(self) -> StepReport:
        round_ = _Round([_closing_delta(sequence) for sequence in self._finished_at_add.values()])
        self._finished_at_add.clear()
        if not may_run_ahead(self._in_flight):
            self._read_passes(round_)
        launched = self._launch_passes(round_)
        if self._steps_ahead:
            launched, self._in_flight = self._in_flight, launched
        for each in launched:
            self._settle_pass(each, round_)
        self._forget_unwanted_passes()
        damaged, self._damaged = self._damaged, {}
        return StepReport(
            round_.deltas, round_.prefill_tokens, round_.decode_tokens, round_.prefilled, damaged
        )

    def _read_passes(self, round_: _Round) -> None:
        """Nothing is in flight afterwards."""
        launched, self._in_flight = self._in_flight, []
        for each in launched:
            self._settle_pass(each, round_)

    def _launch_passes(self, round_: _Round) -> list[LaunchedPass]:
        """Starts who fits, then one step's passes: of what is known, and of tokens that passes in flight will draw."""
        self._residents.admit()
        self._residents.make_room()
        if self._pool is not None:
            self._pool.clear(self._blocks.drain_uncleared())
        views = [sequence.view for sequence in self._residents.running.values()]
        chunk_tokens = self.config.prefill_chunk_tokens
        launched: list[LaunchedPass] = []
        others = sum(not view.background and view.is_decoding for view in views)
        seen = beside_others(views, self._step_cost.room(others), self._steps)
        plan = plan_step(seen, chunk_tokens, self._step_tokens, self._steps, self._prompt_accounts)
        self._prompt_accounts = plan.accounts
        for batch in plan.batches:
            passes = self._launch(batch)
            if passes is None:
                # Nothing is changed by it. Once the tokens are read, the next step cuts it until only the culprit fails.
                self._read_passes(round_)
                break
            launched += passes
        self._steps += 1
        return launched

    def _launch(self, batch: ModelBatch) -> list[LaunchedPass] | None:
        """None: it broke beside a pass in flight, whose tokens it needs."""
        running = self._residents.running
        decoding = (running[sequence_id] for sequence_id in batch.decode)
        works = [_work(sequence, sequence.view.computed_tokens, 1) for sequence in decoding]
        works += [_work(running[chunk.sequence_id], chunk.start, chunk.count) for chunk in batch.chunks]
        assert self._pool is not None  # made with the first model
        model = self._models[batch.model]
        before = next((each for each in self._in_flight if each.base == batch.model), None)
        try:
            if before is None:
                launched = launch_isolated(model.decoder, model.sampler, works, self._pool, self._device)
            else:
                launched = [launch(model.decoder, model.sampler, works, self._pool, self._device, before)]
        except WeightsDamaged as problem:
            self._damaged[batch.model] = str(problem)
            launched = [LaunchedPass(works, errors=dict.fromkeys(range(len(works)), str(problem)))]
        except torch.AcceleratorError:
            raise
        except Exception:
            if before is None:
                raise
            return None
        for work in works:
            work.sequence.view.computed_tokens += work.count
            work.sequence.view.unread_tokens += work.draws
        return launched

    def _settle_pass(self, launched: LaunchedPass, round_: _Round) -> None:
        for outcome in launched.read():
            work = outcome.work
            work.sequence.view.unread_tokens -= work.draws
            if self._residents.is_live(
                work.sequence
            ):  # else it ended, or was cancelled, when this was in flight
                if work.count == 1 and work.start >= work.sequence.view.prompt_tokens:
                    round_.decode_tokens += 1
                else:
                    round_.prefill_tokens += work.count
                round_.deltas.extend(self._settle(outcome, round_.prefilled))

    def _settle(self, outcome: Outcome, prefilled: list[str]) -> list[Delta]:
        """Books what the pass did for one sequence; the delta to report, if there is one."""
        sequence = outcome.work.sequence
        if outcome.error is not None:
            self._residents.leave(sequence, has_failed=True)
            return [_failing_delta(sequence, outcome.error)]
        computed_tokens = outcome.work.start + outcome.work.count
        if computed_tokens < sequence.view.known_tokens:
            return []
        if not sequence.is_prefill_reported:
            sequence.is_prefill_reported = True
            prefilled.append(sequence.sequence_id)
        if outcome.sampled is None:
            if sequence.request.pooling is not None:
                self._residents.note_proven(sequence, computed_tokens)
            self._residents.leave(sequence)
            return [_closing_delta(sequence, sequence.embedding())]
        self._residents.note_proven(sequence, computed_tokens)
        token_start, prompt_logprobs = sequence.generated, sequence.take_prompt_logprobs()
        advance = sequence.advance(outcome.sampled.token)
        if advance.finish_reason is not None:
            self._residents.leave(sequence)
        return [
            Delta(
                sequence_id=sequence.sequence_id,
                token_start=token_start,
                tokens=(outcome.sampled.token,),
                text=advance.text,
                logprobs=() if outcome.sampled.logprob is None else (outcome.sampled.logprob,),
                finish_reason=advance.finish_reason,
                prompt_logprobs=prompt_logprobs,
                cached_prompt_tokens=sequence.cached_prompt_tokens,
            )
        ]

    @contextmanager
    def _reserved(self, handle: str) -> Iterator[None]:
        """While a model is loading, nobody else takes its handle. Raises ValueError when it is taken."""
        with self._models_lock:
            if handle in self._models or handle in self._loading:
                raise ValueError(f"model {handle} is loaded already")
            self._loading.add(handle)
        try:
            yield
        finally:
            with self._models_lock:
                self._loading.discard(handle)

    def _install(self, model: LoadedModel) -> None:
        with self._models_lock:
            pool = self._ensure_pool(model)
        if isinstance(model.decoder, PreparedDecoder):
            with torch.inference_mode():
                model.decoder.prepare(pool)
        with self._models_lock:
            self._ensure_pool(model)  # a model of another type may have come first meanwhile
            self._models[model.info.handle] = model

    def _ensure_pool(self, model: LoadedModel) -> KVPool:
        """One pool for all models; a first model, or one alone after the others are gone, sets its shape."""
        if self._pool is not None and self._pool.kv_shape == model.spec.kv_shape:
            return self._pool
        if self._models:
            raise ModelRefusal(
                f"model {model.info.handle} is of another type than those loaded: (layers, kv heads, head size) "
                f"{model.spec.kv_shape}"
            )
        self._blocks.forget_all()  # what models that left have computed is of the old pool
        self._pool = KVPool(
            model.spec.kv_shape,
            self._blocks.count,
            kv_dtype(self.config.precision),
            self._device,
            self.config.block_tokens,
        )
        return self._pool

    def _find(self, sequence_id: str) -> LiveSequence | None:
        for group in (self._residents.running, self._residents.waiting, self._finished_at_add):
            if sequence_id in group:
                return group[sequence_id]
        return None

    def _live(self) -> list[LiveSequence]:
        groups = (self._residents.running, self._residents.waiting, self._finished_at_add)
        return [sequence for group in groups for sequence in group.values()]


def check_config(config: EngineConfig) -> None:
    """Raises ValueError naming every bad value."""
    problems = []
    if config.precision not in _PRECISIONS:
        problems.append(f"precision {config.precision!r} is none of {', '.join(_PRECISIONS)}")
    if torch.device(config.device).type == "cuda" and config.precision == "int8":
        problems.append("int8 runs on the CPU only")
    for name in ("max_batch", "max_context_tokens", "prefill_chunk_tokens", "block_tokens"):
        if getattr(config, name) < 1:
            problems.append(f"{name} must be at least 1")
    if config.threads < 0:
        problems.append("threads must be at least 1, or 0 to measure")
    if config.steps_ahead not in (None, 0, 1):
        problems.append("steps_ahead must be 0 or 1")
    if config.step_tokens is not None and config.step_tokens < 1:
        problems.append("step_tokens must be at least 1")
    if config.kv_tokens < config.block_tokens:
        problems.append(f"kv_tokens must be at least {config.block_tokens}, one block")
    if problems:
        raise ValueError("engine config: " + "; ".join(problems))


def check_request(request: SequenceRequest, model: ModelInfo, pool_tokens: int) -> None:
    """Raises EngineRefusal.

    1. An empty prompt, or a token id outside the vocabulary -> invalid_token_id.
    2. An answer to a text that is embedded, an empty bad word, or bad words and endings that together forbid every token
       -> invalid_request.
    3. Prompt and answer longer than the model's context or than the whole pool -> context_length_exceeded.
    """
    if not request.prompt_tokens:
        raise EngineRefusal("invalid_token_id", "the prompt has no tokens")
    named: tuple[tuple[str, Sequence[int]], ...] = (
        ("prompt", request.prompt_tokens),
        ("prior tokens", request.prior_tokens),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in request.sampling.logit_bias)),
        ("bad_words", tuple(token for word in request.sampling.bad_words for token in word)),
    )
    for name, tokens in named:
        if tokens and not (min(tokens) >= 0 and max(tokens) < model.vocab_size):
            raise EngineRefusal(
                "invalid_token_id", f"{name}: a token id is outside 0 .. {model.vocab_size - 1}"
            )
    if request.pooling is not None and (request.max_tokens or request.prior_tokens):
        raise EngineRefusal("invalid_request", "a text that is embedded has no answer")
    if not all(request.sampling.bad_words):
        raise EngineRefusal("invalid_request", "bad_words: an empty sequence cannot be banned")
    forbidden = {word[-1] for word in request.sampling.bad_words} | {
        *model.eos_token_ids,
        *request.stop_token_ids,
    }
    if request.sampling.bad_words and len(forbidden) >= model.vocab_size:
        raise EngineRefusal("invalid_request", "bad_words: no token would be left to draw")
    asked_tokens = len(request.prompt_tokens) + request.max_tokens
    room_tokens = min(model.context_tokens, pool_tokens)
    if asked_tokens > room_tokens:
        raise EngineRefusal(
            "context_length_exceeded",
            f"{len(request.prompt_tokens)} prompt tokens and {request.max_tokens} new ones exceed {room_tokens}",
        )


def _work(sequence: LiveSequence, start: int, count: int) -> Work:
    draws = start + count == sequence.view.expected_tokens and sequence.finish_reason is None
    return Work(sequence, start, count, draws)


def _closing_delta(sequence: LiveSequence, embedding: tuple[float, ...] = ()) -> Delta:
    """The end of a sequence that had nothing left to generate."""
    return Delta(
        sequence.sequence_id,
        sequence.generated,
        (),
        "",
        (),
        sequence.finish_reason,
        prompt_logprobs=sequence.take_prompt_logprobs(),
        embedding=embedding,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
    )


def _failing_delta(sequence: LiveSequence, error: str) -> Delta:
    return Delta(
        sequence.sequence_id,
        sequence.generated,
        (),
        "",
        (),
        None,
        error=error,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
    )
