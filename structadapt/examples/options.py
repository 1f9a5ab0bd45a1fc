"""The options of the example, and what they mean."""

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structadapt as sa
from structadapt.adapter_file import read_adapters
from structadapt.adapters import Adapter
from structadapt.examples.process import read_json

LOW_RANK, GATES = {"rank", "alpha", "scaling", "target"}, {"axes", "init", "target"}
# name: (adapter or None for full fine-tuning, the options that apply to it)
ADAPTERS = {
    "lora": (sa.LoRA, LOW_RANK),
    "dora": (sa.DoRA, LOW_RANK),
    "quanta": (sa.QuanTA, GATES),
    "full": (None, set()),
}


@dataclass(frozen=True)
class Settings:
    """What the command line says; None where it says nothing."""

    adapter: str | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: str | None = None
    axes: int | tuple[int, ...] | None = None
    init: str | None = None
    target: str | None = None
    load: str | None = None
    lr: float | None = None
    seed: int = 0
    prompts: int = 8192
    cold_start: float = 0.2
    monitor: int = 1
    out: str | None = None

    @property
    def layers(self) -> str:
        """What to adapt."""
        return "all-linear" if self.target is None else self.target

    def check(self) -> None:
        """ValueError for a number out of range."""
        for name, low, high in (
            ("prompts", 1, 2**31),
            ("seed", 0, 2**63),
            ("lr", 1e-12, 1e3),
            ("cold_start", 0, 1),
            ("monitor", 0, 2**31),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be from {low:g} to {high:g}, got {value}")


_MONITOR = "look at the updates' spectra every N steps (default: 1; 0: never)"
_COLD_START = "sampled held-out accuracy that ends the cold start (default: 0.2; 0: no cold start)"


def add_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of `structadapt grpo`, or all but some."""
    own = "default: the adapter's own"

    def add(name: str, **options: Any) -> None:
        if name not in without:
            parser.add_argument(name, **options)

    add("--adapter", choices=tuple(ADAPTERS), help="default: lora; full trains all the weights")
    add("--rank", type=int, metavar="N", help=f"rank of LoRA and DoRA ({own}, 8 and 16)")
    add("--alpha", type=float, metavar="X", help="scale is alpha / rank (default: 2 rank)")
    add("--scaling", metavar="NAME", help="alpha/r, alpha/sqrt(r) or constant (default: alpha/r)")
    add("--axes", type=_axes, metavar="N", help="QuanTA: how many, or sizes as 8x4x4 (default: 3)")
    add("--init", metavar="NAME", help="QuanTA: identity, paper or zero_last (default: identity)")
    add("--target", metavar="RE", help="layers to adapt (default: all-linear)")
    add("--load", metavar="FILE", help="go on from a saved adapter instead of a fresh one")
    add("--lr", type=float, metavar="X", help="learning rate (default: 2e-3, full: 3e-4)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
    add("--prompts", type=int, default=8192, metavar="N", help="of the epoch (default: 8192)")
    add("--cold-start", type=float, default=0.2, metavar="ACC", help=_COLD_START)
    add("--monitor", type=int, default=1, metavar="N", help=_MONITOR)
    add("--out", metavar="DIR", help="directory for the results (default: a new one in runs); "
        "of a run that was stopped: it goes on")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON, not text")
    add("--quiet", action="store_true", help="no progress, errors alone")


def build_adapter(settings: Settings) -> Adapter | None:
    """The adapter that the settings ask for, or None for full fine-tuning.

    ValueError for an option of another adapter, or one beside `load`: the file says it all.
    """
    options = {name: getattr(settings, name) for name in sorted(LOW_RANK | GATES)}
    options = {name: value for name, value in options.items() if value is not None}
    if settings.load is not None:
        if settings.adapter is not None or options:
            raise ValueError("--load brings its own adapter: leave out the adapter's options")
        return next(iter(read_adapters(settings.load).values())).adapter
    name = settings.adapter or "lora"
    if name not in ADAPTERS:
        raise ValueError(f"unknown adapter {name!r}: choose from {', '.join(ADAPTERS)}")
    kind, applicable = ADAPTERS[name]
    for option in sorted(options.keys() - applicable):
        raise ValueError(f"--{option} does not apply to --adapter {name}")
    options.pop("target", None)
    if "rank" in options:
        options.setdefault("alpha", 2.0 * options["rank"])
    return None if kind is None else kind(**options)


def learning_rate(settings: Settings) -> float:
    """The one asked for, or the default of the adapter."""
    if settings.lr is not None:
        return settings.lr
    return 3e-4 if settings.adapter == "full" else 2e-3


def directory(settings: Settings) -> Path:
    """Make the directory for the results. One that exists is only gone on with if it holds a run
    that was stopped (see `check_same`)."""
    if settings.out is not None:
        out = Path(settings.out)
        if out.exists() and not (out / "config.json").is_file():
            raise FileExistsError(f"--out {out} exists: choose another name, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        return out
    name = Path("runs") / f"grpo-{settings.adapter or 'lora'}-seed{settings.seed}"
    for number in range(1, 10_000):
        out = name if number == 1 else name.with_name(f"{name.name}-{number}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out
    raise FileExistsError(f"{name} and thousands like it exist: choose --out")


def check_same(out: Path, config: dict[str, Any]) -> bool:
    """Whether `out` holds a run with this description that was stopped and can go on.

    Raises FileExistsError for one that is finished, or whose description differs, and says where.
    """
    if not (out / "config.json").is_file():
        return False
    summary = read_json(out / "summary.json")
    if isinstance(summary, dict) and not summary.get("interrupted"):
        raise FileExistsError(f"--out {out} exists and its run is finished: choose another name")
    stored, here = _flat(read_json(out / "config.json")), _flat(config)
    for name in here:
        if name != "settings.out" and stored.get(name) != here[name]:
            raise FileExistsError(
                f"--out {out} exists and holds another run: its {name} is {stored.get(name)!r}, "
                f"and here {here[name]!r}; choose another name"
            )
    return True


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts, as JSON has them."""
    if not isinstance(value, dict):
        return {name: json.loads(json.dumps(value))}
    parts = [_flat(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()]
    return {k: v for part in parts for k, v in part.items()}


def axes_in(text: str) -> int | tuple[int, ...]:
    """Of 3 or 8x4x4. ValueError for anything else."""
    first, *rest = (int(size) for size in text.split("x"))
    return (first, *rest) if rest else first


def _axes(text: str) -> int | tuple[int, ...]:
    try:
        return axes_in(text)
    except ValueError:
        message = f"{text!r} is neither a number of axes (3) nor sizes (8x4x4)"
        raise argparse.ArgumentTypeError(message) from None
