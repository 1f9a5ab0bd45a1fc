"""One run of a study: everything that decides what comes out, and a name for it."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

import structadapt as sa
from structadapt.adapters import Adapter
from structadapt.examples.options import ADAPTERS, axes_in

OPTIONS = ("rank", "alpha", "scaling", "axes", "init")
EMBEDDED = {"tiny": 128, "tiny-256": 256}  # embedded models: their width
# name: whether it is of the embedded models
TASKS = {"addition": True, "sorting": True, "sums": False, "deepmath": False, "gym": False}
# name: what a learning rate is multiplied with, of batch size / batch size at which it holds
RULES: dict[str, Callable[[float], float]] = {
    "fixed": lambda share: 1.0, "sqrt": math.sqrt, "linear": lambda share: share,
}  # fmt: skip
CHOICES = {
    "adapter": tuple(ADAPTERS),
    "task": tuple(TASKS),
    "method": ("grpo", "sft"),
    "lr_rule": tuple(RULES),
    "schedule": ("constant", "linear"),
    "dtype": ("float32", "bfloat16", "float16"),
}
RANGES = {
    "lr": (1e-12, 1e3), "lr_batch": (1, 2**31), "cold_start": (0, 1), "weight_decay": (0, 1e3),
    "prompts": (1, 2**31), "batch": (1, 2**31), "group": (2, 2**20), "minibatches": (1, 2**20),
    "micro_batch": (1, 2**31), "slots": (1, 2**31), "new_tokens": (1, 2**31),
    "problems": (1, 2**31), "samples": (1, 2**20), "stop_absorbed": (0, 2**31),
    "monitor": (0, 2**31), "checkpoint_every": (1, 2**31), "processes": (1, 2**10),
    "seed": (0, 2**63 - 1), "memory_gib": (0, 1e6), "min_difficulty": (-1e6, 1e6),
}  # fmt: skip
DIGITS = 8  # of a hash, which tell a cell's name from others
NO_FIGURE = {"checkpoint_every", "checkpointing", "device", "memory_gib", "processes"}


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides what comes out."""

    adapter: str  # lora, dora, quanta or full
    lr: float  # of AdamW, at `lr_batch` prompts a step if a rule goes with it
    model: str = "tiny"  # tiny, tiny-256, smollm2, or a folder or name of transformers
    task: str = "addition"  # or sorting; for transformers sums, deepmath or gym
    data: str | None = None  # of deepmath: a file, folder or name on the Hub; of gym: a dataset
    min_difficulty: float | None = None  # of deepmath
    method: str = "grpo"  # or sft: the same prompts once, with their answers
    rank: int | None = None
    alpha: float | str | None = None  # a number, or "2r": twice the rank
    scaling: str | None = None  # alpha/r, alpha/sqrt(r) or constant
    axes: int | str | None = None  # of QuanTA: a number, or sizes as "8x4x4"
    init: str | None = None  # of QuanTA
    target: str = "all-linear"
    lr_rule: str = "fixed"  # or grows with the batch, or with its square root
    lr_batch: int = 64  # prompts a step at which `lr` holds
    schedule: str = "constant"  # or falls linearly to 0
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
        for name, hint in get_type_hints(type(self)).items():
            _check(_is_of(getattr(self, name), hint), name, _in_words(hint), self)
        for name, values in CHOICES.items():
            _check(getattr(self, name) in values, name, f"one of {', '.join(values)}", self)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            good = value is None or low <= value <= high
            _check(good, name, f"from {low:.4g} to {high:.4g}", self)
        for name in OPTIONS:
            if name not in ADAPTERS[self.adapter][1] and getattr(self, name) is not None:
                raise ValueError(f"{name} does not apply to adapter = {self.adapter!r}")
        self.build_adapter()
        self._check_together()

    def _check_together(self) -> None:
        embedded = self.model in EMBEDDED
        if TASKS[self.task] != embedded:
            fit = ", ".join(name for name, own in TASKS.items() if own == embedded)
            raise ValueError(f"task {self.task!r} is not for model {self.model!r}: it has {fit}")
        if (self.task in ("deepmath", "gym")) != (self.data is not None):
            raise ValueError(
                "data is for task deepmath (a file, a folder, or zwhe99/DeepMath-103K) and gym (a "
                f"dataset of reasoning-gym), which need it; task is {self.task!r}"
            )
        if self.adapter == "full" and self.dtype != "float32":
            raise ValueError(f"full fine-tuning needs dtype = float32, got {self.dtype!r}")
        if self.method == "sft" and (self.task in ("deepmath", "gym") or self.processes > 1):
            raise ValueError("method sft needs a task with right completions, and one process")
        if self.checkpointing and (embedded or self.grpo.get("share_prompts", True)):
            raise ValueError(
                "checkpointing needs a model of transformers, and share_prompts = false in [grpo]"
            )
        if self.adapter == "full" and self.grpo.get("kl_coef"):
            raise ValueError("kl_coef needs a reference policy, which full fine-tuning changes")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device {self.device!r} is none of torch's") from None

    def build_adapter(self) -> Adapter | None:
        """The adapter, or None for full fine-tuning. ValueError for options it refuses."""
        kind = ADAPTERS[self.adapter][0]
        if kind is None:
            return None
        options = {n: getattr(self, n) for n in OPTIONS}
        options = {n: value for n, value in options.items() if value is not None}
        if isinstance(self.alpha, str):
            good = self.alpha == "2r" and isinstance(self.rank, int)
            _check(good, "alpha", 'a number, or "2r" beside a rank', self)
            options["alpha"] = 2.0 * options["rank"]
        if isinstance(self.axes, str):
            try:
                options["axes"] = axes_in(self.axes)
            except ValueError:
                _check(False, "axes", 'a number, or sizes as "8x4x4"', self)
        return kind(**options)

    @property
    def rate(self) -> float:
        """The learning rate of the optimizer, by the rule."""
        return rate_by(self.lr_rule, self.lr, self.batch, self.lr_batch)

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
        given = {n: given.get(n) for n in OPTIONS}
        return replace(self, lr=self.rate, lr_rule="fixed", lr_batch=64, **given)

    def describe(self) -> dict[str, Any]:
        """What decides the result, as JSON has it. Cells of one description are one run."""
        plain = self.plain()
        whole = {k: v for k, v in asdict(plain).items() if k not in NO_FIGURE}
        if self.adapter in ("lora", "dora"):  # alpha 16 over 8 and 2 as a constant are one run
            whole["scaling"], whole["alpha"] = "constant", float(f"{plain.scale:.4g}")
        whole["lr"] = float(f"{plain.lr:.6g}")
        return whole

    @cached_property
    def id(self) -> str:
        """A name for the cell's folder: what it is, in short, and a part of a hash."""
        parts = [self.adapter if self.method == "grpo" else f"{self.method}-{self.adapter}"]
        if self.rank is not None:
            parts += [f"r{self.rank}", f"s{self.scale:.3g}"]
        parts += [f"axes{self.axes}"] if self.axes is not None else []
        parts += [f"lr{self.rate:.3g}", f"b{self.batch}", f"seed{self.seed}"]
        return "-".join([*parts, digest(self.describe())[:DIGITS]])


def rate_by(rule: str, lr: float, batch: int, lr_batch: int) -> float:
    """The learning rate at a batch size, of `lr` at `lr_batch` and a rule."""
    return lr * RULES[rule](batch / lr_batch)


def digest(content: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


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


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of TOML fits the type of a field. An integer is a number too, true is not."""
    if get_origin(hint) is UnionType:
        return any(_is_of(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _in_words(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    parts = [part for part in get_args(hint) or (hint,) if part is not NoneType]
    return " or ".join(names.get(part, "a table") for part in parts)
