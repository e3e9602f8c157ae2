"""Time and throughput of a run; evaluation, saving and compiling do not count as throughput."""

import time


class Clock:
    """Throughput of the steps since the last reading, and the time of all sittings."""

    def __init__(self, elapsed_s: float) -> None:
        self._started = time.perf_counter() - elapsed_s
        self._reset()

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def count(self, targets: int, step_s: float, data_s: float) -> None:
        self._targets += targets
        self._step_s += step_s
        self._data_s += data_s
        self._steps += 1

    def read(self) -> dict[str, float]:
        """tokens/s, milliseconds per step and per batch since the last reading."""
        rates = {
            "perf/tokens_per_sec": self._targets / max(self._step_s, 1e-9),
            "perf/step_time_ms": 1e3 * self._step_s / max(self._steps, 1),
            "perf/data_time_ms": 1e3 * self._data_s / max(self._steps, 1),
        }
        self._reset()
        return rates

    def _reset(self) -> None:
        self._targets = self._steps = 0
        self._step_s = self._data_s = 0.0
