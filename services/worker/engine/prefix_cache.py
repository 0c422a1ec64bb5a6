"""The pool's blocks by number: who holds them, and which can be found again by the tokens they stand for.

A full block is named by a digest over all tokens up to its end, beginning with whose they are (`prefix_seed`): equal
names mean equal keys and values, and no team can name another's. Blocks that nobody holds stay findable until their
memory is needed, the longest unused first. Knows neither tensors nor requests. Every operation is constant-time for each block it names.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_DIGEST_BYTES = 32


def prefix_seed(isolation_key: str, model: str, adapter: str | None, kernels: str) -> bytes:
    """What keys and values depend on beside the tokens, and who may see them. None: the base model itself.

    kernels: they outlive the model on the device, and other kernels may lay out a block in another way.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (isolation_key, model, "" if adapter is None else f"adapter {adapter}", kernels):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


class PrefixNames:
    """The names of one sequence's full blocks, made as far as they are asked for."""

    __slots__ = ("_block_tokens", "_names", "_seed")

    def __init__(self, seed: bytes, block_tokens: int) -> None:
        self._seed, self._block_tokens = seed, block_tokens
        self._names: list[bytes] = []

    def first(self, count: int, tokens: Sequence[int]) -> list[bytes]:
        """Of the first `count` blocks of `tokens`, which may have grown since the last call but not changed."""
        names = self._names
        while len(names) < count:
            start = len(names) * self._block_tokens
            previous = names[-1] if names else self._seed
            content = array("i", tokens[start : start + self._block_tokens]).tobytes()
            names.append(hashlib.blake2b(previous + content, digest_size=_DIGEST_BYTES).digest())
        return names[:count] if count < len(names) else names


class ComingNames:
    """Names of blocks that running sequences compute right now; a name may be announced by several."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}

    def announce(self, names: Sequence[bytes]) -> None:
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1

    def withdraw(self, names: Sequence[bytes]) -> None:
        for name in names:
            if self._counts[name] == 1:
                del self._counts[name]
            else:
                self._counts[name] -= 1

    def count_first(self, names: Sequence[bytes]) -> int:
        """How many of the first names are coming, up to one that is not."""
        for count, name in enumerate(names):
            if name not in self._counts:
                return count
        return len(names)


class BlockAllocator:
    """Blocks 1 .. count. Each is held by one or several sequences, or idle: remembered by name, or blank.

    Last blanked, first taken: memory that was touched is touched again, the rest stays cold.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._blank = list(range(count, 0, -1))
        self._remembered: OrderedDict[int, None] = OrderedDict()  # the longest idle first
        self._holders = [0] * (count + 1)
        self._was_used = bytearray(count + 1)
        self._uncleared: list[int] = []
        self._by_name: dict[str, dict[bytes, int]] = {}  # for each model
        self._name_of: list[tuple[str, bytes] | None] = [None] * (count + 1)

    @property
    def free(self) -> int:
        """How many can be taken: the blank ones, and those remembered that nobody holds."""
        return len(self._blank) + len(self._remembered)

    @property
    def remembered(self) -> int:
        """Of the free ones, how many still stand for tokens."""
        return len(self._remembered)

    def take(self, count: int) -> list[int]:
        """Blank ones first, then the longest idle, which are forgotten. See `drain_uncleared`.

        Raises ValueError when there are not that many: the caller asks `free` first.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks asked, {self.free} free")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            if self._was_used[block]:
                self._uncleared.append(block)
            self._was_used[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for each; they came from `find`, and nothing was taken since."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._remembered[block]
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """In order of their tokens: the last is forgotten first, for none can be found without those before it."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} given back twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._name_of[block] is None:
                self._blank.append(block)
            else:
                self._remembered[block] = None

    def find(self, model: str, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` that is known."""
        by_name = self._by_name.get(model, {})
        blocks: list[int] = []
        for name in names:
            block = by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_idle(self, block: int) -> bool:
        return not self._holders[block]

    def remember(self, model: str, block: int, name: bytes) -> None:
        """From now on `block`, held and fully written, is found by `name`; where another is already, that one stays."""
        by_name = self._by_name.setdefault(model, {})
        if name not in by_name:
            by_name[name] = block
            self._name_of[block] = (model, name)

    def forget(self, blocks: Sequence[int]) -> None:
        """They are found no more; who holds them keeps them."""
        for block in blocks:
            entry = self._name_of[block]
            if entry is not None:
                model, name = entry
                by_name = self._by_name[model]
                del by_name[name]
                if not by_name:
                    del self._by_name[model]
                self._name_of[block] = None
                if not self._holders[block]:
                    del self._remembered[block]
                    self._blank.append(block)

    def forget_model(self, model: str) -> None:
        self.forget(list(self._by_name.get(model, {}).values()))

    def forget_all(self) -> None:
        for model in list(self._by_name):
            self.forget_model(model)

    def drain_uncleared(self) -> list[int]:
        """Blocks taken since the last call that may hold what their former holder wrote: to be cleared before use."""
        uncleared, self._uncleared = self._uncleared, []
        return uncleared

    def _evict(self) -> int:
        block = next(iter(self._remembered))
        self.forget([block])
        return self._blank.pop()
