"""Pure: how many workers the crowds that came would have wanted, had they been there from the beginning.

A crowd that is as short as a start cannot be met by starting workers for it: what can be learned from it is how many the
next one will want. So beside the real queue there is one in thought for each number of workers, which gets all that
arrives, and of which so many workers do what they can. None of them hangs on how many workers there really were.
"""

from __future__ import annotations

LONGEST_WAITS = 2.0


class Crowds:
    """Backlogs in thought, in tokens, of one worker up to `most`."""

    def __init__(self, most: int) -> None:
        self._tokens = [0.0] * most

    def pass_time(
        self, arrived_tokens: float, passed_s: float, worker_tokens_per_s: float, wait_s: float
    ) -> None:
        """So much arrived in so long; a worker does `worker_tokens_per_s` meanwhile.

        Of what would wait for over twice `wait_s` nothing is kept: too few workers for hours of steady work would else be
        behind for hours after its end, as if crowds came all the while.
        """
        done, longest = passed_s * worker_tokens_per_s, LONGEST_WAITS * wait_s * worker_tokens_per_s
        self._tokens = [
            min(max(tokens + arrived_tokens - count * done, 0.0), count * longest)
            for count, tokens in enumerate(self._tokens, 1)
        ]

    def least_workers(self, wait_s: float, worker_tokens_per_s: float) -> int:
        """The fewest of which nobody waits longer than that now; 0 if nobody would wait for none, the most if none are enough."""
        longest = wait_s * worker_tokens_per_s
        if not self._tokens[0]:
            return 0
        enough = (count for count, tokens in enumerate(self._tokens, 1) if tokens <= count * longest)
        return next(enough, len(self._tokens))
