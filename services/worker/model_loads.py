"""How a model gets onto the device: from its image if there is one, else from its folder in the store.

1. An image is compared with its checksums at each load and, at its first in this process, with its canary. On a CPU most of
   the weights are compared in the first pass after the load, before anything of it is answered (`distrust`).
2. One that differs is thrown away, the model is refused and an alarm raised: nothing of it is ever answered, and nothing that
   was computed before is used again. A later try finds no image and begins with the folder.
3. A folder is compared with its manifest. Then an image is made of it, beside serving, for the next time.
4. An adapter is loaded from its folder, onto its base, which has to be on the device: it is too small to need an image.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from services.worker.engine import ModelInfo, ModelRefusal
from services.worker.engine.images.image_file import ImageDamaged
from services.worker.engine_thread import EngineThread
from services.worker.held import model_handle
from services.worker.image_maker import Asked, ImageMaker
from services.worker.image_store import HeldImage, ImageStore
from services.worker.model_files import ModelUnavailable, read_manifest, verify_files
from services.worker.pull_snapshot import ModelKey
from shared.messages import ModelRef, WeightsRef

log = structlog.get_logger()

OnDamage = Callable[[WeightsRef, str], None]


class ModelLoads:
    def __init__(
        self, engine: EngineThread, store: Path, images: ImageStore | None, on_damage: OnDamage
    ) -> None:
        """images: None loads from folders alone."""
        self._engine, self._store, self._images, self._on_damage = engine, store.resolve(), images, on_damage
        self._maker = None if images is None else ImageMaker(images)
        self._in_use: dict[ModelKey, tuple[WeightsRef, HeldImage]] = {}
        self._asked_canaries: set[str] = set()

    def file_bytes(self, ref: WeightsRef) -> int:
        """Of the model's weights as they were registered. Raises `ModelUnavailable`."""
        files = read_manifest(self._folder(ref)).files
        return sum(file.size_bytes for file in files if file.name.endswith(".safetensors"))

    async def load(self, ref: WeightsRef) -> ModelInfo:
        """Raises `ModelUnavailable`, and whatever the engine raises; then nothing is kept."""
        folder = self._folder(ref)
        if self._images is None or _base(ref) is not None:
            return await self._load_folder(ref, folder)
        key = self._images.key(ref, folder)
        image = self._images.hold(key)
        if image is not None:
            # Another worker that makes room may remove it before our lock is on it: then it is gone by its name.
            with contextlib.suppress(FileNotFoundError):
                return await self._load_image(ref, image)
        info = await self._load_folder(ref, folder)
        if self._maker is not None:
            self._maker.ask(key, Asked(ref, folder, self.file_bytes(ref), is_loaded=True))
        return info

    async def unload(self, key: ModelKey) -> None:
        """Raises `ValueError` while a sequence of it lives."""
        await self._engine.unload(model_handle(key))
        _, image = self._in_use.pop(key, (None, None))
        if image is not None:
            image.close()

    def distrust(self, key: ModelKey, reason: str) -> None:
        """A loaded model's weights turned out to differ from its image's sums. It is still to be unloaded."""
        ref, image = self._in_use[key]
        self._discard(image)
        self._take_out(ref, reason)

    def prepare(self, refs: Iterable[ModelRef]) -> None:
        """Have images made of these models, which may be asked for, and of no others but those that are loaded."""
        if self._images is None or self._maker is None:
            return
        wanted = set()
        for ref in refs:
            if _base(ref) is not None:
                continue
            try:
                folder = self._folder(ref)
                key = self._images.key(ref, folder)
                wanted.add(key)
                if not self._images.has(key):
                    self._maker.ask(key, Asked(ref, folder, self.file_bytes(ref), is_loaded=False))
            except ModelUnavailable as error:
                log.warning("image_not_prepared", model_id=ref.model_id, reason=str(error))
        self._maker.withdraw_others(wanted)

    async def make_images(self, is_busy: Callable[[], bool]) -> None:
        """Make what is asked for, until cancelled; see `ImageMaker.run`."""
        if self._maker is not None:
            await self._maker.run(is_busy)

    async def _load_image(self, ref: WeightsRef, image: HeldImage) -> ModelInfo:
        model = (ref.model_id, ref.revision)
        try:
            info = await self._engine.load_image(
                model_handle(model), image.path, image.key, ask_canary=image.key not in self._asked_canaries
            )
        except ModelRefusal as error:
            # Such as one of a machine whose processor can do more: the folder is served by what is here.
            image.close()
            log.warning("image_not_served", model_id=ref.model_id, reason=str(error))
            return await self._load_folder(ref, self._folder(ref))
        except ImageDamaged as error:
            image.close()
            self._discard(image)
            self._take_out(ref, str(error))
            raise ModelUnavailable("the model's image is damaged") from error
        except BaseException:
            image.close()
            raise
        self._asked_canaries.add(image.key)
        self._in_use[model] = ref, image
        return info

    async def _load_folder(self, ref: WeightsRef, folder: Path) -> ModelInfo:
        try:
            await asyncio.to_thread(verify_files, folder, read_manifest(folder))
        except ModelUnavailable as error:
            self._take_out(ref, str(error))
            raise
        base = _base(ref)
        base_handle = None if base is None else model_handle((base.model_id, base.revision))
        return await self._engine.load(model_handle((ref.model_id, ref.revision)), folder, base_handle)

    def _discard(self, image: HeldImage) -> None:
        assert self._images is not None  # it is one of theirs
        self._images.discard(image.key)
        self._asked_canaries.discard(image.key)  # the one that is made anew has the same key

    def _take_out(self, ref: WeightsRef, reason: str) -> None:
        # Nobody knows since when it differs.
        self._engine.forget_prefixes()
        self._on_damage(ref, reason)

    def _folder(self, ref: WeightsRef) -> Path:
        folder = (self._store / ref.folder).resolve()
        if not folder.is_relative_to(self._store):
            raise ModelUnavailable("the model's folder is outside the store")
        return folder


def _base(ref: WeightsRef) -> WeightsRef | None:
    """Of an adapter."""
    return ref.base if isinstance(ref, ModelRef) else None
