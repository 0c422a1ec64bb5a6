"""From a model folder to a model that can run. Slow and thread-safe: nothing here touches the engine's state."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from .api import EngineConfig, ModelInfo, ModelRefusal
from .decoder import Decoder, WeightsDamaged
from .decoder_choice import describe_kernels, is_placed, make_decoder
from .detokenize import ByteTable, read_byte_table, read_tokenizer_file
from .family_weights import FamilyWeights
from .images.canary import sing
from .images.image_file import ImageDamaged
from .images.model_image import ModelImage, open_model_image
from .lora import PreparedAdapter, read_adapter
from .module_loading import load_module
from .native.decoder import NativeDecoder, refusal_reason
from .sampling import Sampler
from .spec import DecoderSpec, ModelSpec, NotDescribed, read_configs, spec_from_config
from .thread_choice import available_cores, candidate_counts, measure_threads
from .thread_tuner import ThreadTuner
from .weights import Checkpoint

if TYPE_CHECKING:
    from .cuda.placement import Placement

# Of a thread's time beside a model that answers: 325 MB are then copied in 150 ms instead of 15.
_BUSY_SHARE = 0.1
# On a CPU a load is 2 ms of the interpreter, which steps need, too: some 50 ms beside a model that answers.
_BUSY_CPU_SHARE = 0.03
# A few fill what memory can deliver.
_MOST_READING_THREADS = 4


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """base: the handle of the model whose decoder computes it: its own, but for an adapter."""

    info: ModelInfo
    spec: ModelSpec
    decoder: Decoder
    byte_table: ByteTable
    sampler: Sampler
    base: str
    adapter: PreparedAdapter | None = None


class ModelLoader:
    """Loads models of one type. Fine-tunes mostly share one tokenizer, which is then read and held once."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._tuner: ThreadTuner | None = None
        self._tuner_lock = threading.Lock()
        # What `torch.set_num_threads` should say on the thread that steps: torch counts for each thread apart.
        self.torch_threads = 1
        self._placement_lock = threading.Lock()
        self._placement: Placement | None = None
        self._byte_tables: WeakValueDictionary[bytes, ByteTable] = WeakValueDictionary()

    def load(self, handle: str, folder: Path) -> LoadedModel:
        """Raises ModelRefusal."""
        decoder = self._load_decoder(folder)
        self._set_threads(decoder)
        return self.wrap(handle, decoder, self._byte_table(folder))

    def load_image(
        self, handle: str, path: Path, key: str, *, ask_canary: bool, is_busy: Callable[[], bool]
    ) -> LoadedModel:
        """is_busy: whether models are computing at the moment; most of the memory's speed is then left to them.

        On a CPU the weights' panels are compared with their sums in the first pass, which may be a canary's.
        Raises OSError, ImageDamaged.
        """
        found = open_model_image(path, key, self._config.max_context_tokens)
        decoder = self._decoder_of(found, is_busy)
        try:
            if ask_canary and found.canary.differs_from(
                sing(decoder, self._config.precision, self._device), is_exact=self._device.type == "cpu"
            ):
                self.leave(decoder)
                if self._placement is not None:
                    self._placement.forget(key)
                raise ImageDamaged("the model does not say what it said when its image was made")
            self._set_threads(decoder)
        except WeightsDamaged as problem:
            raise ImageDamaged(str(problem)) from problem
        table = self._byte_tables.get(found.tokenizer_digest)
        if table is None:
            table = self._byte_tables[found.tokenizer_digest] = found.byte_table()
        return self.wrap(handle, decoder, table)

    def leave(self, decoder: Decoder) -> None:
        """Nobody asks anything of it any more. Where decoders stand in slots, its slot is free for another model."""
        if self._placement is not None:
            self._placement.leave(decoder)

    def _decoder_of(self, found: ModelImage, is_busy: Callable[[], bool]) -> Decoder:
        """Raises ModelRefusal where this machine has no use for images, ImageDamaged."""
        config = self._config
        if is_placed(found.spec, config, self._device):
            with torch.inference_mode():
                return self._slots().load(found, Pace(is_busy).wait)
        reason = refusal_reason(found.spec, config.precision, config.block_tokens)
        if self._device.type != "cpu" or reason is not None:
            raise ModelRefusal(f"nothing on this machine computes from images: {reason}")
        # While nobody computes, the processors are this load's: its answer is what is waited for.
        threads = 1 if is_busy() else self._reading_threads()
        wait = Pace(is_busy, _BUSY_CPU_SHARE).wait
        with found.image.verifying(wait, threads=threads, first_bytes=found.unsummed_bytes()):
            return NativeDecoder(
                found.spec, found.weights, config.precision, config.threads or 1, found.panel_sums
            )

    def _reading_threads(self) -> int:
        chosen = 1 if self._tuner is None else self._tuner.chosen
        return min(self._config.threads or chosen, _MOST_READING_THREADS)

    def _slots(self) -> Placement:
        from .cuda.placement import Placement

        with self._placement_lock:
            if self._placement is None:
                self._placement = Placement(self._config, self._device)
            return self._placement

    def wrap(self, handle: str, decoder: Decoder, byte_table: ByteTable) -> LoadedModel:
        spec = decoder.spec
        info = ModelInfo(
            handle=handle,
            weight_bytes=decoder.weight_bytes,
            vocab_size=spec.vocab_size,
            context_tokens=min(self._config.max_context_tokens, spec.max_positions),
            eos_token_ids=spec.eos_token_ids,
            kernels=describe_kernels(decoder, self._config, self._device),
        )
        return LoadedModel(info, spec, decoder, byte_table, Sampler(spec.vocab_size, self._device), handle)

    def load_adapter(self, handle: str, base: LoadedModel, folder: Path) -> LoadedModel:
        """Raises ModelRefusal."""
        if base.adapter is not None:
            raise ModelRefusal(f"{base.info.handle} is an adapter itself; adapters stand on full models")
        if not isinstance(base.spec, DecoderSpec):
            raise ModelRefusal(f"{base.info.handle} is of a type that is not described: it takes no adapters")
        with torch.inference_mode():
            adapter = base.decoder.prepare_adapter(read_adapter(folder, handle, base.spec))
        info = replace(base.info, handle=handle, weight_bytes=adapter.weight_bytes)
        return replace(base, info=info, adapter=adapter)

    def _set_threads(self, decoder: Decoder) -> None:
        """What is measured, and again while they answer, counts for all models: they share the machine with the first."""
        if self._device.type != "cpu":
            return
        if not isinstance(decoder, NativeDecoder):
            self.torch_threads = self._config.threads or 1
        elif self._config.threads == 0:
            with self._tuner_lock:
                if self._tuner is None:
                    counts = candidate_counts(available_cores())
                    self._tuner = ThreadTuner(counts, measure_threads(decoder, counts))
            decoder.threads, decoder.tuner = self._tuner.chosen, self._tuner

    def _load_decoder(self, folder: Path) -> Decoder:
        config, generation = read_configs(folder)
        precision, device = self._config.precision, self._device
        with Checkpoint(folder) as checkpoint:
            try:
                spec = spec_from_config(config, generation)
            except NotDescribed:
                # The open checkpoint has shown that its files are sound and of this folder.
                return load_module(folder, config, generation, precision, device)
            with torch.inference_mode():
                weights = FamilyWeights(spec, checkpoint)
                if spec.rope is not None:
                    # Tables of angles end where sequences end: a config may name millions of positions.
                    positions = min(spec.max_positions, self._config.max_context_tokens)
                    spec = replace(spec, max_positions=positions)
                if is_placed(spec, self._config, device):
                    return self._slots().pack(spec, weights)
                decoder = make_decoder(spec, weights, self._config, device)
                weights.check_nothing_is_left()
                return decoder

    def _byte_table(self, folder: Path) -> ByteTable:
        content = read_tokenizer_file(folder)
        digest = hashlib.sha256(content).digest()
        table = self._byte_tables.get(digest)
        if table is None:
            # Two loads at once may both build it; the later one is kept, and both are right.
            table = read_byte_table(content)
            self._byte_tables[digest] = table
        return table


class Pace:
    """Keeps each thread that reads to a share of its time while others need the memory.

    Counted is the time that it computes: what it waits for a disk, or for a processor that others have, takes nothing from
    anybody, and ten times that would be seconds.
    """

    def __init__(self, is_busy: Callable[[], bool], share: float = _BUSY_SHARE) -> None:
        self._is_busy, self._share, self._own = is_busy, share, threading.local()
        self._own.since_s = time.thread_time()

    def wait(self, _read_bytes: int) -> None:
        """A thread's first call but the maker's counts nothing: what it computed before was not said."""
        since_s: float | None = getattr(self._own, "since_s", None)
        if since_s is not None and self._is_busy():
            time.sleep((time.thread_time() - since_s) * (1 / self._share - 1))
        self._own.since_s = time.thread_time()
