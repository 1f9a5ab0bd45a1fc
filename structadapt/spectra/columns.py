"""The columns of a report: what each holds, in words, with formula and unit.

s_1 >= ... >= s_n are the singular values of a matrix (out, in), n = min(out, in); e = s^2,
p = e / sum(e), a = s / sum(s). Logarithms are natural, angles in degrees, shares from 0 to 1.
"""

from dataclasses import dataclass

SCHEMA = 1  # of the JSON; raised when a field changes its meaning or goes away
CONVENTIONS = {
    "shape": "(out, in)",
    "effective_rank": "of amplitudes s (Roy & Vetterli 2007)",
    "effective_rank_energy": "of energies s^2",
    "topk_energy": "k = 1, of energies s^2",
    "alpha": "of eigenvalues s^2",
    "logarithm": "natural",
    "angles": "degrees",
    "null": "a Gaussian matrix of the same shape; of an update in factors, Gaussian factors",
    "missing": "null: there is nothing to say, or the number is not finite",
}


@dataclass(frozen=True)
class Column:
    """One field of a row."""

    name: str
    head: str  # over a column of a table
    meaning: str
    null: bool = False  # whether <name>_null and <name>_ratio stand beside it


IDENTITY = (
    Column("name", "module", "path of the module, without wrappers"),
    Column("layer", "layer", "the first number in the path"),
    Column("module_type", "type", "the last words of the path: q_proj, mlp.dense"),
    Column("kind", "kind", "weight, update, direction (s B A alone), effective (all of W' - W)"),
    Column("shape", "out x in", "(out, in)"),
    Column("dtype", "dtype", "of what is stored"),
    Column("source", "source", "path of the file, or model"),
    Column("precision", "precision", "how the values came about"),
    Column("max_rank", "max rank", "min(out, in), or the rank of the factors where less"),
)
MEASURES = (
    Column("effective_rank", "eff. rank", "exp(-sum a ln a), Roy & Vetterli 2007", null=True),
    Column("effective_rank_energy", "of energy", "D_1 = exp(-sum p ln p)", null=True),
    Column("participation_ratio", "particip.", "D_2 = (sum e)^2 / sum e^2", null=True),
    Column("stable_rank", "stable rank", "D_inf = sum e / e_1", null=True),
    Column("topk_energy", "top-1 energy", "e_1 / sum e", null=True),
    Column("k50", "k50", "fewest directions with 50 % of the energy", null=True),
    Column("k90", "k90", "fewest directions with 90 % of the energy", null=True),
    Column("k95", "k95", "fewest directions with 95 % of the energy", null=True),
    Column("k99", "k99", "fewest directions with 99 % of the energy", null=True),
    Column(
        "numerical_rank",
        "num. rank",
        "#{s_i > s_1 max(out, in) eps}, as torch's matrix_rank; missing where sigma_floor is above",
    ),
    Column("rank_above_noise", "above noise", "#{s_i > noise_edge}"),
    Column(
        "noise_edge",
        "noise edge",
        "sqrt(mean ulp^2 / 12) (sqrt out + sqrt in) of a difference; of two below float32, the sum "
        "of both ulp^2",
    ),
    Column("effective_rank_cut", "eff. rank, cut", "effective_rank of the s_i above noise_edge"),
    Column("spectral_norm", "|.|_2", "s_1, not squared"),
    Column("frobenius_norm", "|.|_F", "sqrt(sum e), not squared"),
    Column("nuclear_norm", "|.|_*", "sum s"),
    Column("condition", "condition", "s_1 / s_n; missing where s_n is below sigma_floor"),
    Column("gini", "Gini", "sum_i (2i - n - 1) s_(i) / (n sum s), ascending", null=True),
    Column("hoyer", "Hoyer", "(sqrt n - sum s / sqrt(sum e)) / (sqrt n - 1)", null=True),
    Column("alpha", "alpha", "power law of the tail of e, Clauset et al. 2009", null=True),
    Column("alpha_n_tail", "n tail", "eigenvalues in that tail"),
    Column("alpha_D", "D", "Kolmogorov-Smirnov distance of that tail"),
    Column("alpha_sigma", "sigma", "standard error of alpha, (alpha - 1) / sqrt(n_tail)"),
    Column("alpha_clip_low", "alpha, low", "smallest alpha with up to 9 top values left out"),
    Column("alpha_clip_high", "alpha, high", "largest alpha with up to 9 top values left out"),
    Column("alpha_median", "alpha med.", "power law of the upper half of e", null=True),
    Column(
        "mp_spikes",
        "MP spikes",
        "eigenvalues above the Marchenko-Pastur bulk of a shuffle, Tracy-Widom 99 %; none of "
        "factors",
    ),
    Column("mp_spike_energy", "spike energy", "their share of sum e"),
    Column("relative_norm", "|dW|/|W| F", "|dW|_F / |W|_F"),
    Column("relative_spectral", "|dW|/|W| 2", "s_1(dW) / s_1(W)"),
    Column("nss_drift", "NSS drift", "|s(W') - s(W)|_2 / |s(W)|_2"),
    Column(
        "angle_left_max",
        "angle left",
        "largest angle between the principal left subspaces of W and W'",
    ),
    Column("angle_left_median", "median left", "the median of those angles"),
    Column("angle_right_max", "angle right", "largest angle between the right ones"),
    Column("angle_right_median", "median right", "the median of those angles"),
    Column(
        "off_principal_left",
        "off left",
        "share of |dW|_F^2 outside W's top left directions",
        null=True,
    ),
    Column("off_principal_right", "off right", "share outside W's top right directions", null=True),
    Column(
        "off_principal_both",
        "off both",
        "share outside the top directions of both sides",
        null=True,
    ),
    Column(
        "intruders",
        "intruders",
        "of the top 10 left vectors of W', those with no |cosine| of 0.5 to one of W; Shuttleworth "
        "et al. 2024",
    ),
    Column("sparsity", "unchanged", "share of weights with |w' - w| <= 0.001 max(|w|, |w'|)"),
    Column("magnitude_mean", "m drift", "DoRA: mean of |m / |W|_row - 1|"),
    Column("magnitude_max", "m drift max", "DoRA: max of |m / |W|_row - 1|"),
)
END = (
    Column("method", "method", "gram, svd or factors"),
    Column("sigma_floor", "floor", "singular values below cannot be told from rounding"),
    Column("n_elements", "elements", "out x in"),
    Column("seconds", "seconds", "wall time for this matrix"),
    Column("status", "status", "ok, partial or skipped"),
    Column("reason", "reason", "why it is not ok"),
)


def _names() -> tuple[str, ...]:
    nulls = [f"{c.name}_{part}" for c in MEASURES if c.null for part in ("null", "ratio")]
    groups = (IDENTITY, MEASURES, END)
    first, measures, last = ([c.name for c in group] for group in groups)
    return (*first, *measures, *nulls, *last)


COLUMNS: tuple[str, ...] = _names()  # the fields of a row, in this order
NULLED: tuple[str, ...] = tuple(c.name for c in MEASURES if c.null)
HEADS: dict[str, str] = {c.name: c.head for c in (*IDENTITY, *MEASURES, *END)}


def meaning(name: str) -> str:
    """What a column holds, in words. KeyError for one that is none."""
    words = {c.name: c.meaning for c in (*IDENTITY, *MEASURES, *END)}
    for part, text in (
        ("null", "{} of random matrices of the same shape"),
        ("ratio", "{0} / {0}_null"),
    ):
        stem = name.removesuffix(f"_{part}")
        if stem != name and stem in NULLED:
            return text.format(stem)
    return words[name]


def head(name: str) -> str:
    """What stands over a column of a table."""
    stem = name.removesuffix("_ratio")
    return f"{HEADS[stem]}/null" if stem != name and stem in NULLED else HEADS.get(name, name)


def title(name: str) -> str:
    """What stands at an axis of a picture, where there is room for a word."""
    stem = name.removesuffix("_ratio") if name.removesuffix("_ratio") in NULLED else name
    words = TITLES.get(stem, stem.replace("_", " "))
    return words if stem == name else f"{words} / random"


TITLES = {
    "participation_ratio": "participation ratio D_2",
    "topk_energy": "top-1 energy",
    "relative_norm": "|dW| / |W|, Frobenius",
    "relative_spectral": "|dW| / |W|, spectral",
    "frobenius_norm": "Frobenius norm",
    "alpha_median": "alpha of the upper half",
}


def table() -> str:
    """The columns as a Markdown table, for docs/spectra.md."""
    lines = ["| field | meaning | null |", "|---|---|---|"]
    for column in (*IDENTITY, *MEASURES, *END):
        words = column.meaning.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {words} | {'yes' if column.null else ''} |")
    return "\n".join(lines)
