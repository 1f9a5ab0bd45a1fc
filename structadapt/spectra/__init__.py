"""What weights and their updates look like: measures of singular values, and reports over
models, checkpoints and adapters."""

from structadapt.spectra.analysis import analyze
from structadapt.spectra.comparing import Comparison, compare
from structadapt.spectra.evidence import Finding, Limits, findings
from structadapt.spectra.measures import (
    effective_rank,
    effective_rank_energy,
    hill_number,
    participation_ratio,
    singular_values,
    stable_rank,
    topk_energy,
)
from structadapt.spectra.monitor import Monitor, Reading
from structadapt.spectra.report import Report
from structadapt.spectra.states import Row, Thresholds

__all__ = [
    "Comparison",
    "Finding",
    "Limits",
    "Monitor",
    "Reading",
    "Report",
    "Row",
    "Thresholds",
    "analyze",
    "compare",
    "effective_rank",
    "effective_rank_energy",
    "findings",
    "hill_number",
    "participation_ratio",
    "singular_values",
    "stable_rank",
    "topk_energy",
]
