"""How long a device may tell nothing of the work that it has."""

from __future__ import annotations

from typing import Final

PATIENCE_S: Final = 10.0
"""Unless its queue pair says otherwise..."""
_LEAST_BYTES_PER_S: Final = 64 << 10
"""...and as long again as the chunks that it has take at this rate, for it need not tell of each."""


class Silence:
    """Counted in ticks: neither a process nor a machine that was stopped takes its own silence for another's."""

    def __init__(self) -> None:
        self.patience_s = PATIENCE_S
        """Within it a device gets a packet through, or gives up."""
        self._tick_s = self._lasted_s = self._owed_s = 0.0

    def end(self, *, is_paid: bool = False) -> None:
        """The device told something, or got new work. `is_paid`: it told of work of ours."""
        self._lasted_s = 0.0
        if is_paid:
            self._owed_s = 0.0

    def ticked(self, tick_s: float, *, is_due: bool) -> None:
        """`is_due`: whether it is bound to tell of work of ours. What the peer sends is no excuse."""
        self._tick_s = tick_s
        self._lasted_s += tick_s
        self._owed_s = self._owed_s + tick_s if is_due else 0.0

    @property
    def is_notable(self) -> bool:
        """Whether it, or what is due, has lasted a whole tick."""
        return max(self._lasted_s, self._owed_s) > self._tick_s

    def limit_s(self, posted_bytes: int) -> float:
        """How long it may last while a device has these to send."""
        return self.patience_s + posted_bytes / _LEAST_BYTES_PER_S

    def is_too_long(self, posted_bytes: int) -> bool:
        # Not before the device heard the doorbell again, however rare the ticks are.
        return self._owed_s > max(self.limit_s(posted_bytes), 2 * self._tick_s)
