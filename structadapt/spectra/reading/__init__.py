"""Whatever holds weights, as matrices that are read when they are asked for.

| source                                        | matrices                                        |
|-----------------------------------------------|-------------------------------------------------|
| safetensors file, shards, .pt or .bin, module | "weight": every matrix of floats                |
| the same with a base of the same layers       | "update": W' - W, row by row                    |
| PEFT folder, adapter file, adapted module     | "update" by its factors, or "direction" (DoRA)  |
| the same with a base                          | also "effective", and sizes relative to W       |
| folder of a training run                      | those of its adapter.safetensors                |
"""

from structadapt.spectra.reading.contents import Source, base_of_run
from structadapt.spectra.reading.matrix import (
    Matrix,
    Opened,
    Rows,
    Skipped,
    SourceError,
    SourceNotFoundError,
)
from structadapt.spectra.reading.names import Patterns
from structadapt.spectra.reading.sources import open_source

__all__ = [
    "Matrix",
    "Opened",
    "Patterns",
    "Rows",
    "Skipped",
    "Source",
    "SourceError",
    "SourceNotFoundError",
    "base_of_run",
    "open_source",
]
