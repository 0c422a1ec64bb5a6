"""Our engine and its images as a side of `loadtest.hotswap`, by the engine's public calls only. Runs in a child process.

What it lacks beside a worker is the policy: requests begin strictly in their order of arrival.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from loadtest.hotswap_sides import CONTEXT_TOKENS, MAX_BATCH, PRECISION, ModelPaths
from loadtest.hotswap_traffic import PATIENCE_S, Arrival
from services.worker.engine import Engine, EngineConfig, ModelInfo, Sampling, SequenceRequest

_PROMPT = tuple(range(100, 116))
_IDLE_S = 0.001


class Ours:
    def __init__(self, models: list[ModelPaths], threads: int) -> None:
        self._models = models
        self._engine = Engine(
            EngineConfig(
                precision=PRECISION,
                threads=threads,
                max_batch=MAX_BATCH,
                max_context_tokens=CONTEXT_TOKENS,
                kv_tokens=MAX_BATCH * CONTEXT_TOKENS,
            )
        )
        self._count = 0

    def first_token_s(self, model: int, *, in_full: bool = False) -> float:
        started_s = time.perf_counter()
        self._load(model, ask_canary=in_full)
        self._add(model, _PROMPT, 1)
        while self._engine.has_work:
            for delta in self._engine.step().deltas:
                if delta.error is not None or len(delta.tokens) != 1:
                    raise RuntimeError(f"no first token: {delta}")
        seconds = time.perf_counter() - started_s
        self._engine.unload_model(str(model))
        return seconds

    def answer(self, model: int, prompt: list[int], tokens: int) -> list[int]:
        self._engine.load_model(str(model), self._models[model].folder)
        self._add(model, tuple(prompt), tokens)
        answer: list[int] = []
        while self._engine.has_work:
            for delta in self._engine.step().deltas:
                if delta.error is not None:
                    raise RuntimeError(delta.error)
                answer += delta.tokens
        self._engine.unload_model(str(model))
        return answer

    def decode(self, seconds: float, *, beside_loads: bool, streams: int) -> tuple[float, int]:
        """Model 0 answers; model 1 is loaded from its image, let go, loaded again, without a pause."""
        self._load(0)
        names = [self._add(0, _PROMPT, CONTEXT_TOKENS - len(_PROMPT)) for _ in range(streams)]
        begun: set[str] = set()
        while len(begun) < streams:
            begun |= {delta.sequence_id for delta in self._engine.step().deltas}
        tokens, loads, loading = 0, 0, None
        with ThreadPoolExecutor(1) as loader:
            started_s = time.perf_counter()
            while (passed_s := time.perf_counter() - started_s) < seconds:
                if beside_loads and (loading is None or loading.done()):
                    loads += self._finish(loading)
                    loading = loader.submit(self._load, 1)
                tokens += self._engine.step().decode_tokens
            loads += self._finish(loading)
        for name in names:
            self._engine.cancel(name)
        self._engine.unload_model("0")
        return tokens / passed_s, loads

    def replay(self, trace: list[Arrival], slots: int) -> list[float | None]:
        return FifoReplay(self._engine, self._models, trace, slots).run()

    def _finish(self, loading: Future[ModelInfo] | None) -> int:
        """Lets the model go that was loaded; how many that were."""
        if loading is None:
            return 0
        self._engine.unload_model(loading.result().handle)
        return 1

    def _load(self, model: int, *, ask_canary: bool = False) -> ModelInfo:
        return load(self._engine, self._models, model, ask_canary=ask_canary)

    def _add(self, model: int, prompt: tuple[int, ...], tokens: int) -> str:
        self._count += 1
        return add(self._engine, f"{model}-{self._count}", model, prompt, tokens)


class FifoReplay:
    """One trace: as many models as there are slots, the longest unused goes, but none that has work. A request begins when
    all before it have begun; those that run are batched as a worker batches them.
    """

    def __init__(self, engine: Engine, models: list[ModelPaths], trace: list[Arrival], slots: int) -> None:
        self._engine, self._models, self._trace, self._slots = engine, models, trace, slots
        self._waiting: deque[int] = deque()
        self._running: dict[str, int] = {}
        self._answered: dict[int, int] = {}
        self._resident: dict[int, float] = {}
        self._loading: tuple[int, Future[ModelInfo]] | None = None
        self._latencies: list[float | None] = [None] * len(trace)
        self._started_s = 0.0

    def run(self) -> list[float | None]:
        coming = 0
        self._resident[0] = 0.0
        load(self._engine, self._models, 0)
        self._started_s = time.perf_counter()
        with ThreadPoolExecutor(1) as loader:
            while coming < len(self._trace) or self._waiting or self._running:
                now_s = time.perf_counter() - self._started_s
                while coming < len(self._trace) and self._trace[coming].at_s <= now_s:
                    self._waiting.append(coming)
                    coming += 1
                self._give_up(now_s)
                self._begin(now_s, loader)
                if self._engine.has_work:
                    self._step()
                else:
                    time.sleep(_IDLE_S)
            if self._loading is not None:
                self._resident[self._loading[0]] = 0.0
                self._loading[1].result()
        for model in self._resident:
            self._engine.unload_model(str(model))
        return self._latencies

    def _give_up(self, now_s: float) -> None:
        while self._waiting and now_s - self._trace[self._waiting[0]].at_s > PATIENCE_S:
            self._waiting.popleft()
        for name, index in list(self._running.items()):
            if now_s - self._trace[index].at_s > PATIENCE_S:
                self._engine.cancel(name)
                del self._running[name]

    def _begin(self, now_s: float, loader: ThreadPoolExecutor) -> None:
        if self._loading is not None and self._loading[1].done():
            self._loading[1].result()
            self._resident[self._loading[0]] = now_s
            self._loading = None
        while self._waiting and len(self._running) < MAX_BATCH:
            model = self._trace[self._waiting[0]].model
            if model not in self._resident:
                if self._loading is None and self._make_room():
                    self._loading = (model, loader.submit(load, self._engine, self._models, model))
                return
            index = self._waiting.popleft()
            arrival = self._trace[index]
            name = add(self._engine, f"replay-{index}", model, arrival.prompt, arrival.answer_tokens)
            self._running[name], self._answered[index] = index, 0
            self._resident[model] = now_s

    def _make_room(self) -> bool:
        with_work = {self._trace[index].model for index in self._running.values()}
        idle = [model for model in self._resident if model not in with_work]
        if len(self._resident) < self._slots:
            return True
        if not idle:
            return False
        victim = min(idle, key=lambda model: self._resident[model])
        self._engine.unload_model(str(victim))
        del self._resident[victim]
        return True

    def _step(self) -> None:
        deltas = self._engine.step().deltas
        now_s = time.perf_counter() - self._started_s
        for delta in deltas:
            if delta.error is not None:
                raise RuntimeError(delta.error)
            index = self._running[delta.sequence_id]
            self._answered[index] += len(delta.tokens)
            if delta.finish_reason is not None:
                if self._answered[index] != self._trace[index].answer_tokens:
                    raise RuntimeError(f"request {index} got {self._answered[index]} tokens")
                self._latencies[index] = now_s - self._trace[index].at_s
                self._resident[self._trace[index].model] = now_s
                del self._running[delta.sequence_id]


def load(engine: Engine, models: list[ModelPaths], model: int, *, ask_canary: bool = False) -> ModelInfo:
    paths = models[model]
    return engine.load_image(str(model), paths.image, paths.key, ask_canary=ask_canary)


def add(engine: Engine, name: str, model: int, prompt: tuple[int, ...], tokens: int) -> str:
    """Greedy, of exactly that length."""
    engine.add(
        SequenceRequest(
            sequence_id=name,
            model=str(model),
            isolation_key="loadtest",
            prompt_tokens=prompt,
            max_tokens=tokens,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
        )
    )
    return name
