"""Timing on a device: CUDA graphs over rotating inputs, providers in turns, peak memory.

A call is recorded into a CUDA graph where it can be, so that no launch is timed; one that waits for
the device, or allocates as a graph may not, is timed between events with its launches, and the
result says which. On a CPU (`--smoke`) a clock stands in.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[int], Any]  # with the number of a set of inputs
SAMPLE_MS = 2.0  # a sample is repeated to about this long
WARM = 2


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """The last cache of the device."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` to rotate: three, or more to leave the cache."""
    return max(3, -(-2 * cache_bytes(device) // max(nbytes, 1))) if device.type == "cuda" else 1


@dataclass
class Timer:
    """One function, ready to be timed again and again."""

    call: Call
    sets: int
    device: torch.device
    pool: Any = None  # of all graphs of a cell: each one leaves nothing alive
    mode: str = "clock"
    note: str = ""  # why no graph
    graph: Any = field(default=None, repr=False)
    repeats: int = 1

    def prepare(self) -> "Timer":
        """Warm up and record. Raises what the function raises."""
        if self.device.type == "cuda":
            self._record()
        else:
            self._all_sets()
        return self

    def _all_sets(self) -> None:
        for i in range(self.sets):
            self.call(i)

    def _record(self) -> None:
        self.mode = "events"
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._all_sets()
            self.note = _waits(lambda: self.call(0))
        torch.cuda.current_stream(self.device).wait_stream(side)
        sync(self.device)
        if not self.note:
            # Every set once: the replay rotates too, and is long enough to time.
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    self._all_sets()
                self.graph, self.mode = graph, "graph"
            except Exception as error:
                self.note = brief(error)
            sync(self.device)
        first = min(self._sample(1) for _ in range(2))
        self.repeats = max(1, min(100, round(SAMPLE_MS / max(first * self.sets, 1e-3))))

    def _sample(self, repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run = self.graph.replay if self.graph is not None else self._all_sets
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / (repeats * self.sets)

    def sample(self) -> float:
        """Milliseconds of one call."""
        if self.device.type == "cuda":
            return self._sample(self.repeats)
        begin = time.perf_counter()
        self._all_sets()
        return 1e3 * (time.perf_counter() - begin) / self.sets


def _waits(call: Callable[[], Any]) -> str:
    """What a function waits for, or "": recording one that waits would spoil the process."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        return brief(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes alive in a call, beyond those before it; None on a CPU."""
    if device.type != "cuda":
        return None
    sync(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    sync(device)
    return torch.cuda.max_memory_allocated(device) - before


def graph_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def in_turns(
    timers: dict[str, Timer], rounds: int, least: int, seconds: float, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of every timer, once a round in random order: what slows one slows all.

    `rounds`, or as many as fit into `seconds`, but at least `least`.
    """
    order = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in timers}
    end = time.monotonic() + seconds
    for number in range(rounds):
        if number >= least and time.monotonic() > end:
            break
        for name in order.sample([*timers], len(timers)):
            found[name].append(timers[name].sample())
    return found


def spread(values: Sequence[float], digits: int = 5) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    if len(values) < 2:
        values = [*values] * 2
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    middle = statistics.median(values)
    found = {"median": middle, "p20": cuts[0], "p80": cuts[3]}
    return {k: round(v, digits) for k, v in found.items()}


def ratios(one: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(one, base, strict=True)]


# -- ceilings --------------------------------------------------------------------------------------


def ceilings(device: torch.device, smoke: bool) -> dict[str, Any]:
    """TFLOP/s of a large bf16 product and TB/s of a large copy, read and written."""
    n, count = (64, 2**10) if smoke else (8192, 2**30)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    timers = {
        "product": Timer(lambda _: torch.mm(a, b, out=out), 1, device).prepare(),
        # A kernel: a graph makes a transfer of a copy, which is slower.
        "copy": Timer(lambda _: torch.neg(source, out=target), 1, device).prepare(),
    }
    times = in_turns(timers, 2 if smoke else 20, 2, 10.0)
    product, copy = (spread(times[name]) for name in ("product", "copy"))
    return {
        "status": "ok",
        "tflops": float(f"{2 * n**3 / product['median'] / 1e9:.4g}"),
        "tbs": float(f"{8 * count / copy['median'] / 1e9:.4g}"),
        "product": {"n": n, "ms": product},
        "copy": {"bytes": 8 * count, "ms": copy},
    }
