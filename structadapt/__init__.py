"""structadapt: choose the structure of a weight update."""

from structadapt import grpo, spectra
from structadapt.adapters import DoRA, LoRA, QuanTA
from structadapt.checkpoint import load, save
from structadapt.layers import AdaptedLinear
from structadapt.surgery import (
    adapt,
    adapter_parameters,
    delta_weights,
    disabled,
    merge,
    merged,
    plan,
    summary,
    unmerge,
)

__all__ = [
    "AdaptedLinear",
    "DoRA",
    "LoRA",
    "QuanTA",
    "adapt",
    "adapter_parameters",
    "delta_weights",
    "disabled",
    "grpo",
    "load",
    "merge",
    "merged",
    "plan",
    "save",
    "spectra",
    "summary",
    "unmerge",
]
