"""Whether adapters of the same layers use the same directions."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structadapt.spectra.engine import EPS
from structadapt.spectra.reading import Matrix, Patterns, Source, open_source
from structadapt.spectra.relations import subspace_similarity
from structadapt.spectra.report import shown
from structadapt.spectra.rows import FAULTS

SIDES = ("left", "right")


def between(
    sources: Mapping[str, Source], include: Patterns = None, exclude: Patterns = None
) -> list[dict[str, Any]]:
    """For every two sources and every matrix that is there in factors in both and of one shape:
    {one, other, name, left, right, left_null, right_null}.

    left is phi = |U0^T U1|_F^2 / min(i, j) of the spaces of outputs that the two updates reach
    (Hu et al. 2021, section 7.2), right that of the inputs they see, 0 to 1; the nulls are
    max(i, j) / out and max(i, j) / in, what independent random spaces have. An update of zeros is
    left out. include, exclude: as for `analyze`.
    """
    opened = {
        label: _factored(open_source(source, include=include, exclude=exclude).matrices)
        for label, source in sources.items()
    }
    found = []
    for name in dict.fromkeys(itertools.chain(*opened.values())):
        spaces = {label: _spaces(own[name]) for label, own in opened.items() if name in own}
        for (one, left), (other, right) in itertools.combinations(spaces.items(), 2):
            if left and right and [len(X) for X in left] == [len(X) for X in right]:
                found.append({"one": one, "other": other, "name": name, **_pair(left, right)})
    return found


def lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The medians over the matrices of every two sources, as a Markdown table."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in found:
        groups.setdefault((record["one"], record["other"]), []).append(record)
    heads = ("left phi", "random", "right phi", "random")
    table = ["| " + " | ".join(("subspaces of", "matrices", *heads)) + " |", "|---|" + "--:|" * 5]
    columns = [f"{side}{part}" for side in SIDES for part in ("", "_null")]
    for pair, records in groups.items():
        medians = [shown(float(np.median([r[c] for r in records])), 3) for c in columns]
        names = " and ".join(shown(name).replace("|", "\\|") for name in pair)
        table.append("| " + " | ".join((names, str(len(records)), *medians)) + " |")
    return table if groups else []


def _factored(matrices: Iterable[Matrix]) -> dict[str, Matrix]:
    return {matrix.name: matrix for matrix in matrices if matrix.factors is not None}


def _spaces(matrix: Matrix) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases, (out, j) and (in, j), of what B A reaches and of what it sees."""
    assert matrix.factors is not None
    try:
        B, A = matrix.factors()
        (Q, R), (P, S) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, s, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
    except FAULTS:
        return None  # its row says why
    j = int((s > max(matrix.shape) * EPS * s.max()).sum()) if len(s) else 0
    return (Q @ U[:, :j], P @ Vh[:j].T) if j else None


def _pair(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, float]:
    found = {}
    for side, a, b in zip(SIDES, one, other, strict=True):
        found[side] = subspace_similarity(a, b)
        found[f"{side}_null"] = max(a.shape[1], b.shape[1]) / a.shape[0]
    return found
