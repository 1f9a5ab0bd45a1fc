"""docs/spectra.md says what every column is, in the words of the code."""

from pathlib import Path

from structadapt.spectra.columns import table
from structadapt.spectra.evidence import RULES

TEXT = (Path(__file__).parents[1] / "docs" / "spectra.md").read_text()


def test_every_column_and_finding_is_explained():
    assert table() in TEXT
    for name in RULES:
        assert f"| `{name}` |" in TEXT
