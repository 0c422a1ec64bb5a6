"""Which sequences run, which wait, and the blocks of the pool they hold. Decisions are `batching.py`'s; `Engine` calls."""

from __future__ import annotations

from collections import OrderedDict

from .batching import FoundPrefix, choose_admission, choose_victim, waits_for_prefix
from .prefix_cache import BlockAllocator, ComingNames
from .sequence import LiveSequence


class Residents:
    """running: at most max_batch, in order of their start. waiting: in order of arrival."""

    def __init__(self, blocks: BlockAllocator, block_tokens: int, max_batch: int) -> None:
        self._blocks, self._block_tokens, self._max_batch = blocks, block_tokens, max_batch
        self._coming = ComingNames()
        self._coming_soon = ComingNames()
        """Those that no background work computes: nobody else waits for what itself waits for others."""
        self.running: dict[str, LiveSequence] = {}
        self.waiting: OrderedDict[str, LiveSequence] = OrderedDict()

    def enqueue(self, sequence: LiveSequence) -> None:
        self.waiting[sequence.sequence_id] = sequence

    def admit(self) -> None:
        """Starts who may start; what others of the same team computed before counts as computed.

        A place is kept for who waits for another's prefix. Background work is behind all others.
        """
        places = self._max_batch - len(self.running)
        kept = 0
        in_order = sorted(self.waiting.values(), key=lambda each: each.view.background)
        for sequence in in_order[:places]:
            full = sequence.reusable_tokens // self._block_tokens
            names = sequence.names.first(full, sequence.known)
            found = self._blocks.find(sequence.view.model, names)
            left = names[len(found) :]
            coming = self._coming if sequence.view.background else self._coming_soon
            if waits_for_prefix(len(left), coming.count_first(left)):
                kept += 1
                continue
            wanted = choose_admission(
                sequence.view,
                FoundPrefix(len(found), sum(map(self._blocks.is_idle, found))),
                len(self.running) + kept,
                self._blocks.free,
                self._max_batch,
                self._block_tokens,
            )
            if wanted is None:
                return
            del self.waiting[sequence.sequence_id]
            self._start(sequence, found, wanted)
            sequence.announced = left
            self._coming.announce(left)
            if not sequence.view.background:
                self._coming_soon.announce(left)

    def make_room(self) -> None:
        """Each sequence gets the block its next token needs, the oldest first; the youngest may have to go."""
        short = [
            each
            for each in self.running.values()
            if each.view.expected_tokens > each.view.held_tokens and not each.view.only_waits
        ]
        for sequence in short:
            while sequence.sequence_id in self.running and not self._extend(sequence):
                victim = choose_victim([each.view for each in self.running.values()])
                if victim is None:
                    raise AssertionError("out of blocks, and everyone holds all it may need")
                self._preempt(victim)

    def is_live(self, sequence: LiveSequence) -> bool:
        """Whether it is this one that runs or waits: a later one may have its id."""
        sequence_id = sequence.sequence_id
        return sequence in (self.running.get(sequence_id), self.waiting.get(sequence_id))

    def note_proven(self, sequence: LiveSequence, tokens: int) -> None:
        """Its blocks that its first `tokens` fill can be found from now on, if it still runs.

        To be called when logits that attended to all of them were finite: a NaN in any would have reached these.
        """
        if sequence.sequence_id not in self.running:
            return
        full = tokens // self._block_tokens
        if full > sequence.findable_blocks:
            names = sequence.names.first(full, sequence.known)
            for index in range(sequence.findable_blocks, full):
                self._blocks.remember(sequence.view.model, sequence.blocks[index], names[index])
            sequence.findable_blocks = full
        self._withdraw(sequence)

    def leave(self, sequence: LiveSequence, has_failed: bool = False) -> None:
        """Its blocks are free, those that were proven stay findable; of one that failed, none does.

        A pass in flight may still write into them: passes run in the order of their launch, and their next owner's come
        later, as does clearing them.
        """
        if self.running.pop(sequence.sequence_id, None) is None:
            del self.waiting[sequence.sequence_id]  # it gave way before its last token was read
        if has_failed:
            self._blocks.forget(sequence.blocks)
        self._release(sequence)

    def cancel(self, sequence_id: str) -> None:
        """An unknown id is a no-op."""
        self.waiting.pop(sequence_id, None)
        if sequence_id in self.running:
            self.leave(self.running[sequence_id])

    def _start(self, sequence: LiveSequence, found: list[int], wanted: int) -> None:
        self._blocks.share(found)
        sequence.blocks = found + self._blocks.take(wanted)
        sequence.findable_blocks = len(found)
        view = sequence.view
        view.held_tokens = len(sequence.blocks) * self._block_tokens
        view.computed_tokens = len(found) * self._block_tokens
        if not sequence.is_prefill_reported:
            sequence.cached_prompt_tokens = min(view.computed_tokens, view.prompt_tokens)
        self.running[sequence.sequence_id] = sequence

    def _extend(self, sequence: LiveSequence) -> bool:
        if not self._blocks.free:
            return False
        sequence.blocks += self._blocks.take(1)
        sequence.view.held_tokens += self._block_tokens
        return True

    def _preempt(self, sequence_id: str) -> None:
        """Back to waiting, where it is the oldest; what is evicted of its keys and values will be computed again."""
        sequence = self.running.pop(sequence_id)
        self._release(sequence)
        sequence.view.preemptions += 1
        self.waiting[sequence_id] = sequence
        self.waiting.move_to_end(sequence_id, last=False)

    def _withdraw(self, sequence: LiveSequence) -> None:
        if sequence.announced:
            self._coming.withdraw(sequence.announced)
            if not sequence.view.background:
                self._coming_soon.withdraw(sequence.announced)
            sequence.announced = []

    def _release(self, sequence: LiveSequence) -> None:
        self._withdraw(sequence)
        self._blocks.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.findable_blocks = 0
        sequence.view.computed_tokens = sequence.view.held_tokens = 0
