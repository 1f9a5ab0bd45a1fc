"""What a model's adapters are read from and written to, and other formats than our own."""

import os
from pathlib import Path

from torch import nn

from structadapt.checkpoint import load_file
from structadapt.interop.merged import export_merged
from structadapt.interop.peft_config import CONFIG_FILE
from structadapt.interop.peft_export import export_peft
from structadapt.interop.peft_import import load_peft

__all__ = ["export_merged", "export_peft", "load", "load_peft"]


def load(model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True) -> nn.Module:
    """Put saved adapters into `model`, in place; returns the model.

    path: a file of `structadapt.save`, or a folder that PEFT wrote (LoRA, rsLoRA, DoRA).

    A bare model is adapted as the file says and its other parameters are frozen; a model that is
    adapted already must have the same adapters on the same layers. Everything is checked before
    anything changes. The base weights must be those that the adapters were saved over, as far as
    bf16 tells; `check_base=False` is for other ones on purpose, such as a quantised base. (PEFT
    writes nothing to check.)

    Raises FileNotFoundError; AdapterFileError (a ValueError) for a file that is truncated,
    damaged, from a newer format, not finite, or for another model or base, naming what differs;
    RuntimeError for a model that is compiled, sharded, merged or on the meta device.
    """
    if not Path(path).is_dir():
        return load_file(model, path, check_base=check_base)
    if not (Path(path) / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{path} is a folder without {CONFIG_FILE}: no PEFT adapter")
    return load_peft(model, path)
