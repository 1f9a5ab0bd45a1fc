"""What ends an RLVR run that goes on running, seen while it happens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from structadapt.grpo.config import Step


class CollapseError(RuntimeError):
    """The policy has collapsed; the message says what was seen."""


class Observer(Protocol):
    """What `train` lets look at every step, after the guard did (`spectra.Monitor` is one)."""

    def after(self, step: Step) -> Sequence[str]:
        """Sentences that join the step's alarms, on every process the same. It must leave the model
        and the global random number generators alone."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the run's checkpoints keep of it: dicts with texts or numbers as keys, lists,
        tensors, texts, numbers and None."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from what `state_dict` gave."""
        ...


@dataclass
class Guard:
    """Looks at each step's record and names what it sees; ValueError for a limit out of range.

    "absorbing": for `patience` steps in a row every group's rewards were all equal. The gradient of
        such a step is exactly 0: nothing moves the policy out of it again.
    "kl": the update moved the policy by more than `max_kl` nats a token.
    "length": the mean length is more than `length_factor` times the median of the first `patience`
        steps, and above 16 tokens.
    """

    patience: int = 8
    max_kl: float = 1.0
    length_factor: float = 4.0
    equal: int = 0  # steps in a row without an advantage
    lengths: list[float] = field(default_factory=list)  # of the first steps

    def __post_init__(self) -> None:
        if not (self.patience >= 1 and self.max_kl > 0 and self.length_factor > 1):
            raise ValueError(
                "patience must be at least 1, max_kl positive and length_factor above 1, got "
                f"{self.patience}, {self.max_kl} and {self.length_factor}"
            )

    def look(self, step: Step) -> tuple[str, ...]:
        """The alarms of a step, most telling first."""
        alarms = []
        still = step.zero_std_fraction == 1 and step.updates == 0  # no penalty moves it either
        self.equal = self.equal + 1 if still else 0
        if self.equal >= self.patience:
            alarms.append(
                f"absorbing: the rewards of every group are equal since step "
                f"{step.step - self.equal + 1} (mean reward {step.reward:.3g})"
            )
        if not step.kl <= self.max_kl:  # NaN too
            alarms.append(f"kl: the update moved the policy by {step.kl:.3g} nats a token")
        if len(self.lengths) < self.patience:
            self.lengths.append(step.length)
        elif step.length > max(self.length_factor * median(self.lengths), 16):
            first = median(self.lengths)
            alarms.append(f"length: {step.length:.4g} tokens a completion, {first:.4g} at first")
        return tuple(alarms)
