"""structadapt: choose the structure of a weight update."""

from structadapt import grpo, spectra
from structadapt.adapters import DoRA, LoRA, QuanTA
from structadapt.checkpoint import save
from structadapt.interop import export_merged, export_peft, load
from structadapt.layers import AdaptedLinear
from structadapt.merging import MergeReport, merge, merged, merged_if_exact, unmerge
from structadapt.ops import Explanation, backend, explain
from structadapt.shared import shared_input
from structadapt.surgery import (
    adapt,
    adapter_parameters,
    delta_weights,
    disabled,
    parameter_groups,
    plan,
    summary,
)

__all__ = [
    "AdaptedLinear",
    "DoRA",
    "Explanation",
    "LoRA",
    "MergeReport",
    "QuanTA",
    "adapt",
    "adapter_parameters",
    "backend",
    "delta_weights",
    "disabled",
    "explain",
    "export_merged",
    "export_peft",
    "grpo",
    "load",
    "merge",
    "merged",
    "merged_if_exact",
    "parameter_groups",
    "plan",
    "save",
    "shared_input",
    "spectra",
    "summary",
    "unmerge",
]
