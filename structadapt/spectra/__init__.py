"""What an update looks like: measures of singular values, and reports over models and files."""

from structadapt.spectra.measures import (
    effective_rank,
    effective_rank_energy,
    participation_ratio,
    singular_values,
    stable_rank,
    topk_energy,
)
from structadapt.spectra.monitor import Monitor, Reading
from structadapt.spectra.report import Report, analyze
from structadapt.spectra.states import Row, Thresholds

__all__ = [
    "Monitor",
    "Reading",
    "Report",
    "Row",
    "Thresholds",
    "analyze",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
    "singular_values",
    "stable_rank",
    "topk_energy",
]
