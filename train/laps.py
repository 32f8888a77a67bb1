"""Where a run's time went: one stopwatch, read at the end of each part."""

from __future__ import annotations

import time


class Laps:
    """Seconds by part, in the order in which the parts ended."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """What passed since the part before ended belongs to this one; a name may come again."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._began
