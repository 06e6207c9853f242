"""Which points a store has, in little memory: a run has thousands of steps with some eighty metrics each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Points:
    """A set of (metric, step, time), in a few hundred bytes a step: metrics are the bits of one integer."""

    _bits: dict[str, int] = field(default_factory=dict)  # metric -> its bit
    _steps: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # step -> (time in ms, bits) of each

    def add(self, name: str, step: int, time_ms: int) -> None:
        bit = self._bits.setdefault(name, 1 << len(self._bits))
        entries = dict(self._steps.get(step, ()))
        entries[time_ms] = entries.get(time_ms, 0) | bit
        self._steps[step] = tuple(entries.items())

    def time_ms(self, name: str, step: int) -> int | None:
        """When the metric was logged at this step; None where it was not."""
        bit = self._bits.get(name, 0)
        return next((time_ms for time_ms, bits in self._steps.get(step, ()) if bits & bit), None)
