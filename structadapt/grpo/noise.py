"""Numbers that depend on what they are for and on nothing else.

The noise of a completion is keyed by (seed, step, prompt, sample): it is the same on one machine
and on many, after a restart, and whatever else is sampled beside it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: Sequence[Sequence[int]], count: int) -> Tensor:
    """(N, count) numbers in [0, 1), float64, a row for each key: SplitMix64 (Steele et al. 2014),
    started at a hash of the key. A key is a few integers from 0 on, all keys of one length;
    ValueError for a negative one."""
    if min(map(min, keys)) < 0:
        raise ValueError("a key of noise (a seed, a step, ...) must not be negative")
    parts = np.asarray(keys, dtype=np.uint64).reshape(len(keys), -1)
    state = np.zeros(len(keys), np.uint64)
    with np.errstate(over="ignore"):  # it counts modulo 2^64
        for part in parts.T:
            state = _mixed(state + GOLDEN + part)
        counter = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        bits = _mixed(state[:, None] + counter)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
