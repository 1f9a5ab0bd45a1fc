"""One run of a study: everything that decides what comes out, and a name for it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import structadapt as sa
from structadapt.adapters import Adapter

ADAPTERS = {"lora": sa.LoRA, "dora": sa.DoRA, "quanta": sa.QuanTA, "full": None}
Rule = Literal["fixed", "linear", "sqrt"]
Method = Literal["grpo", "sft"]
Schedule = Literal["constant", "linear"]
LOW_RANK, GATES = ("rank", "alpha", "scaling"), ("axes", "init")
EXPERIMENT = 8  # hexadecimal digits of a cell's name that tell it from others
NOT_THE_RUN = {
    "checkpoint_every",
    "checkpointing",
    "device",
    "memory_gib",
    "processes",
}  # no figure


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides what comes out."""

    adapter: str  # lora, dora, quanta or full
    lr: float  # of AdamW, at `lr_batch` prompts a step if a rule goes with it
    model: str = "tiny"  # tiny, tiny-256, smollm2, or a folder or name of transformers
    task: str = "addition"  # addition, sorting, sums (for transformers), or deepmath
    data: str | None = None  # of deepmath: a file, a folder or a name on the Hugging Face Hub
    min_difficulty: float | None = None  # of deepmath
    method: Method = "grpo"  # or sft: the same prompts once, with their answers
    rank: int | None = None
    alpha: float | str | None = None  # a number, or "2r": twice the rank
    scaling: str | None = None  # alpha/r, alpha/sqrt(r) or constant
    axes: int | str | None = None  # of QuanTA: a number, or sizes as "8x4x4"
    init: str | None = None  # of QuanTA
    target: str = "all-linear"
    lr_rule: Rule = "fixed"  # or grows with the batch, or with its square root
    lr_batch: int = 64  # prompts a step at which `lr` holds
    schedule: Schedule = "constant"  # or falls linearly to 0
    weight_decay: float = 0.0
    seed: int = 0  # of the base model, the adapter, the prompts and the noise
    prompts: int = 2048  # each is seen once
    batch: int = 32  # prompts a step
    group: int = 8  # completions of a prompt
    minibatches: int = 1
    micro_batch: int | None = None  # sequences of one backward pass
    slots: int | None = None  # sequences that are sampled at once
    new_tokens: int | None = None  # None: the task's own
    checkpointing: bool = False  # gradients, of a model of transformers
    cold_start: float = 0.2  # of an embedded model: sampled accuracy that ends it
    problems: int = 500  # held-out, before and after
    samples: int = 1  # of each, beside the greedy one
    stop_absorbed: int = 8  # equal steps that end a run; 0: it goes on to the last prompt
    monitor: int = 4  # steps between looks at the spectra of the update
    checkpoint_every: int = 16  # steps
    device: str = "cpu"
    dtype: str = "float32"  # of the base
    processes: int = 1  # that work on one cell, started by torchrun
    memory_gib: float | None = None  # of one device, for --dry-run
    grpo: Mapping[str, Any] = field(default_factory=dict)  # further fields of grpo.Config

    def __post_init__(self) -> None:
        for name, values in (
            ("adapter", tuple(ADAPTERS)), ("lr_rule", get_args(Rule)),
            ("method", get_args(Method)), ("schedule", get_args(Schedule)),
            ("dtype", ("float32", "bfloat16", "float16")),
        ):  # fmt: skip
            _check(getattr(self, name) in values, name, f"one of {', '.join(values)}", self)
        for name in ("lr", "cold_start", "weight_decay"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool)
            good = good and math.isfinite(value) and value >= 0
            _check(good, name, "a number, not negative", self)
        for name, least in (
            ("prompts", 1), ("batch", 1), ("group", 2), ("minibatches", 1), ("lr_batch", 1),
            ("problems", 1), ("samples", 1), ("checkpoint_every", 1), ("processes", 1),
            ("seed", 0), ("stop_absorbed", 0), ("monitor", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _check(good, name, f"an integer, at least {least}", self)
        applicable = {"lora": LOW_RANK, "dora": LOW_RANK, "quanta": GATES, "full": ()}[self.adapter]
        for name in (*LOW_RANK, *GATES):
            if name not in applicable and getattr(self, name) is not None:
                raise ValueError(f"{name} does not apply to adapter = {self.adapter!r}")
        self.build_adapter()

    def build_adapter(self) -> Adapter | None:
        """The adapter, or None for full fine-tuning. ValueError for options it refuses."""
        kind = ADAPTERS[self.adapter]
        if kind is None:
            return None
        options = {n: getattr(self, n) for n in (*LOW_RANK, *GATES)}
        options = {n: value for n, value in options.items() if value is not None}
        if isinstance(self.alpha, str):
            good = self.alpha == "2r" and isinstance(self.rank, int)
            _check(good, "alpha", 'a number, or "2r" beside a rank', self)
            options["alpha"] = 2.0 * options["rank"]
        if isinstance(self.axes, str):
            try:
                options["axes"] = tuple(int(size) for size in self.axes.split("x"))
            except ValueError:
                _check(False, "axes", 'a number, or sizes as "8x4x4"', self)
        return kind(**options)

    @property
    def rate(self) -> float:
        """The learning rate of the optimizer, by the rule."""
        share = self.batch / self.lr_batch
        return self.lr * {"fixed": 1.0, "linear": share, "sqrt": math.sqrt(share)}[self.lr_rule]

    @property
    def scale(self) -> float | None:
        """s of W' = W + s B A, or None without a rank."""
        return getattr(self.build_adapter(), "scale", None)

    def plain(self) -> "Cell":
        """The same run as its numbers say it: no rules, no names for alpha, nothing by default."""
        adapter = self.build_adapter()
        given = adapter.config() if adapter is not None else {}
        axes = given.get("axes")
        given["axes"] = "x".join(map(str, axes)) if isinstance(axes, tuple | list) else axes
        given = {n: given.get(n) for n in (*LOW_RANK, *GATES)}
        return replace(self, lr=self.rate, lr_rule="fixed", lr_batch=64, **given)

    def describe(self) -> dict[str, Any]:
        """What decides the result, as JSON has it. Cells of one description are one run."""
        plain = self.plain()
        whole = {k: v for k, v in asdict(plain).items() if k not in NOT_THE_RUN}
        if self.adapter in ("lora", "dora"):  # alpha 16 over 8 and 2 as a constant are one run
            whole["scaling"], whole["alpha"] = "constant", float(f"{plain.scale:.4g}")
        whole["lr"] = float(f"{plain.lr:.6g}")
        return whole

    @property
    def id(self) -> str:
        """A name for the cell's folder: what it is, in short, and a part of a hash."""
        parts = [self.adapter if self.method == "grpo" else f"{self.method}-{self.adapter}"]
        if self.rank is not None:
            parts += [f"r{self.rank}", f"s{self.scale:.3g}"]
        parts += [f"axes{self.axes}"] if self.axes is not None else []
        parts += [f"lr{self.rate:.3g}", f"b{self.batch}", f"seed{self.seed}"]
        text = json.dumps(self.describe(), sort_keys=True)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:EXPERIMENT])
        return "-".join(parts)


def config(cell: Cell, eos: Any, pad: int, new_tokens: int) -> sa.grpo.Config:
    """How a cell samples and updates."""
    own = {
        "eos_token_id": eos, "pad_token_id": pad, "max_new_tokens": cell.new_tokens or new_tokens,
        "group_size": cell.group, "prompts_per_step": cell.batch, "minibatches": cell.minibatches,
        "micro_batch_size": cell.micro_batch, "slots": cell.slots, "seed": cell.seed,
        "share_prompts": True,
    }  # fmt: skip
    twice = sorted(own.keys() & cell.grpo.keys() - {"share_prompts"})
    if twice:
        raise ValueError(f"[grpo] {twice[0]} belongs to the cells, or comes from the model")
    return sa.grpo.Config(**{**own, **cell.grpo})


def _check(good: bool, name: str, expected: str, cell: Cell) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, got {getattr(cell, name)!r}")
