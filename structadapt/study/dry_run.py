"""What a grid would run, and whether it fits: nothing is loaded and nothing is run.

Memory of one device, estimated: the base, 16 bytes for every trained parameter (fp32 value,
gradient and Adam's moments; divided over the processes of a cell that trains all weights), the keys
and values of `slots` sequences, and for the update what a micro-batch keeps of every layer (with
gradients checkpointed: its input) and its logits in fp32. Buffers of libraries and fragmentation
are not in it: leave some 10 %.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structadapt as sa
from structadapt import terminal
from structadapt.examples import tiny_lm
from structadapt.study.cell import EMBEDDED, Cell
from structadapt.study.grid import Grid

GIB = 2**30
PROMPT = 512  # tokens, where a task does not say
STATE = 16  # bytes of a trained parameter


@dataclass(frozen=True)
class Shape:
    """What the memory of a causal LM depends on."""

    layers: int
    hidden: int
    key_values: int  # width of the keys of one layer, and of its values
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    base: int
    training: int
    cache: int
    update: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.training + self.cache + self.update


def main(grid: Grid, cells: Sequence[Cell], as_json: bool) -> int:
    """List the cells. Returns 1 if one does not fit its memory_gib."""
    rows = [(cell, estimate(cell, *model_of(cell.model))) for cell in cells]
    over = [cell for cell, e in rows if cell.memory_gib and e.total > cell.memory_gib * GIB]
    if as_json:
        terminal.show(json.dumps([{"id": c.id, **vars(e), "total": e.total, "fits": c not in over}
                                  for c, e in rows]))  # fmt: skip
        return 1 if over else 0
    prompts = sum(c.prompts for c, _ in rows)
    heads = f"{'base':>7} {'training':>8} {'cache':>7} {'update':>7} {'all':>7}"
    lines = [f"{grid.name}: {len(rows)} cells, {prompts:,} prompts in all", ""]
    lines.append(f"{'GiB of a device:':52} {heads}")
    for cell, found in rows:
        parts = (found.base, found.training, found.cache, found.update, found.total)
        shown = " ".join(
            f"{part / GIB:{w}.2f}" for part, w in zip(parts, (7, 8, 7, 7, 7), strict=True)
        )
        where = f"  {cell.processes} x {cell.device}" if cell.processes > 1 else f"  {cell.device}"
        note = f"  more than {cell.memory_gib:g} GiB" if cell in over else ""
        lines.append(f"{Path(cell.model).name + ' ' + cell.id:52} {shown}{where}{note}")
    terminal.show("\n".join(lines))
    return 1 if over else 0


@lru_cache
def model_of(name: str) -> tuple[nn.Module, Shape]:
    """A model without values, from its config alone. ValueError where that cannot be had."""
    with torch.device("meta"):
        if name in EMBEDDED:
            width = EMBEDDED[name]
            return tiny_lm.TinyLM(width), Shape(2, width, width, tiny_lm.VOCAB)
        config = _config(name)
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return model, Shape(
        config.num_hidden_layers,
        config.hidden_size,
        size * (getattr(config, "num_key_value_heads", None) or heads),
        config.vocab_size,
    )


# From their published configs: a dry run needs no download.
KNOWN = {
    "smollm2": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    }),
    "Qwen/Qwen3-8B-Base": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }),
    "meta-llama/Llama-3.1-8B": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }),
    "ibm-granite/granite-3.1-8b-base": ("granite", {
        "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155,
    }),
}  # fmt: skip


def _config(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError("transformers is not here: pip install 'structadapt[hf]'") from None
    if name in KNOWN:
        kind, values = KNOWN[name]
        return AutoConfig.for_model(kind, **values)
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model {name}: its config cannot be read ({error})") from None


def estimate(cell: Cell, model: nn.Module, shape: Shape) -> Estimate:
    """Bytes on one device of a cell."""
    bytes_of = torch.finfo(getattr(torch, cell.dtype)).bits // 8
    count = sum(p.numel() for p in model.parameters())
    adapter = cell.build_adapter()
    if adapter is None:
        base, training = 0, STATE * count // cell.processes
    else:
        base = bytes_of * count
        training = sa.plan(model, adapter, cell.target).training_bytes
    new = cell.new_tokens or 32
    length = new + (PROMPT if new > 64 else 64)
    own = -(-cell.batch // cell.processes) * cell.group
    slots = min(cell.slots or own, own)
    cache = slots * length * shape.layers * 2 * shape.key_values * bytes_of
    micro = min(cell.micro_batch or own, own)
    # Kept of a token: some 34 values of the hidden size in a layer (of all, or of one at a time).
    inside = 34 * shape.hidden * bytes_of
    layers = shape.hidden * bytes_of * shape.layers if cell.checkpointing else inside * shape.layers
    update = micro * length * (layers + inside * cell.checkpointing)
    update += min(micro * length, 4096) * shape.vocabulary * 4
    return Estimate(base, training, cache, update)
