"""How speed is measured: functions that take turns; median and spread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PAUSE_S = 0.1


def take_turns(
    functions: dict[str, Callable], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function in each round by a clock, after one call of each to warm up.

    The functions take turns, so that a disturbance of the machine meets all of them, with a pause
    between: threads of OpenMP and OpenBLAS keep a core busy for a while after their work.

    Example:
      >>> [len(times) for times in take_turns({"nothing": lambda: None}, repeats=3).values()]
      [3]
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(_PAUSE_S)
            start = clock()
            function()
            times[name].append(clock() - start)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most.

    Example:
      >>> spread([3.0, 1.0, 7.0])
      {'median': 3.0, 'min': 1.0, 'max': 7.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(
    functions: dict[str, Callable], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each function; see ``take_turns``.

    Example:
      >>> measured = seconds({"nothing": lambda: None}, repeats=3)
      >>> sorted(measured["nothing"])
      ['max', 'median', 'min']
    """
    return {name: spread(times) for name, times in take_turns(functions, repeats, clock).items()}


def judged(figures: Mapping[str, Any], bars: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each figure that is promised and was measured, its most, and whether it holds.

    Example:
      >>> judged({"lost": 2, "p50": 0.1}, {"lost": 0, "open": 2.0})
      {'lost': {'value': 2, 'most': 0, 'holds': False}}
    """
    return {
        name: {"value": figures[name], "most": most, "holds": figures[name] <= most}
        for name, most in bars.items()
        if name in figures
    }
