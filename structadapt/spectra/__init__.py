"""What an update looks like: measures of singular values, and reports over models and files."""

from structadapt.spectra.measures import (
    effective_rank,
    effective_rank_energy,
    participation_ratio,
    singular_values,
    stable_rank,
    topk_energy,
)
from structadapt.spectra.report import Report, analyze

__all__ = [
    "Report",
    "analyze",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
    "singular_values",
    "stable_rank",
    "topk_energy",
]
