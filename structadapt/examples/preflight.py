"""Say whether `structadapt grpo` with the same options would collapse, from its first update.

Cold start, then the first step on trial: the KL between the policy before and after it, the size of
the update, a verdict, and, where that is not "safe", a learning rate (or alpha) whose first update
is, measured. What the verdict rests on, and what it cannot say: docs/preflight.md.

    structadapt preflight                                LoRA, rank 8
    structadapt preflight --rank 256 --alpha 512         will collapse
    structadapt preflight && structadapt grpo            train only where it would not

exit codes:
    0    safe or uncertain
    1    not finite: a gradient, or the logits
    2    bad input, nothing was begun
    3    no signal: nothing can be said
    4    will collapse
    130  Ctrl-C
"""

import argparse
import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import structadapt as sa
from structadapt import terminal
from structadapt.examples import show, tiny_lm
from structadapt.examples.grpo import Run
from structadapt.examples.options import Settings, learning_rate
from structadapt.examples.process import first_interrupt, strict
from structadapt.layers import find_adapted

EXIT = {"safe": 0, "uncertain": 0, "no signal": 3, "will collapse": 4}
COLOUR = {"safe": "green", "will collapse": "red"}  # others: yellow


def main(args: argparse.Namespace) -> int:
    """Run the pre-flight of the example. Returns the exit code."""
    names = Settings.__dataclass_fields__
    settings = Settings(**{k: v for k, v in vars(args).items() if k in names})
    progress = show.Progress(quiet=terminal.is_quiet(args))
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # a tiny model gains nothing from more
    with tempfile.TemporaryDirectory() as scratch:  # a run has a directory; nothing is kept of it
        try:
            trial = Trial.prepare(replace(settings, out=str(Path(scratch) / "run")))
        except (ValueError, OSError) as error:
            terminal.say("structadapt preflight", "error", error)
            return 2
        assert isinstance(trial, Trial)
        with first_interrupt(progress.quiet) as interrupted:
            trial._cold_start(progress, interrupted)
            if interrupted():
                return 130
        try:
            report, alpha = trial.report()
        except FloatingPointError as error:
            terminal.say("structadapt preflight", "error", error)
            return 1
    terminal.show(_json(report, alpha) if args.json else _text(report, alpha))
    return EXIT[report.verdict]


@dataclass(frozen=True)
class Alpha:
    """A lower scale of the adapter that is safe at the learning rate as it is."""

    alpha: float
    kl: float  # nats a token, after the first update


@dataclass
class Trial(Run):
    """A run of the example that takes its first step on trial."""

    def report(self) -> tuple[sa.grpo.Preflight, Alpha | None]:
        """The pre-flight of the cold-started model, and an alpha in place of its suggestion."""
        fresh = copy.deepcopy(self.model)
        report, alpha = self.look(tries=3), getattr(self.adapter, "alpha", None)
        best = report.suggestion
        if best is None or alpha is None or self.settings.load is not None:
            return report, None
        # The first update of LoRA is B's alone: alpha scales it as the learning rate does.
        alpha = float(f"{alpha * best.factor:.2g}")
        adapter = replace(self.adapter, alpha=alpha)  # type: ignore[type-var]
        found = replace(self, model=fresh, adapter=adapter).look(tries=0)
        return report, Alpha(alpha, found.kl) if found.verdict == "safe" else None

    def look(self, tries: int) -> sa.grpo.Preflight:
        settings, parameters = self.settings, self._adapt()
        rng = random.Random(f"grpo {settings.seed}")
        prompts = list(islice(tiny_lm.problems(rng, held_out=False), settings.prompts))
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate(settings), weight_decay=0.0)
        total = sa.grpo.steps_in(len(prompts), self.config) * self.config.minibatches
        return sa.grpo.preflight(
            self.model,
            optimizer,
            prompts,
            sa.grpo.exact_match,
            self.config,
            tokenizer=tiny_lm.CharTokenizer(),
            rollout_context=self._rollout_context,
            scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
            weights=self._weights if self.adapter is not None else None,
            tries=tries,
        )

    def _weights(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, layer in find_adapted(self.model).items():
            yield name, layer.weight.detach(), layer.delta_weight()


def _text(report: sa.grpo.Preflight, alpha: Alpha | None) -> str:
    verdict, rest = str(report).split(":", 1)
    lines = [f"{terminal.paint(verdict, COLOUR.get(verdict, 'yellow'), sys.stdout)}:{rest}"]
    if report.suggestion is not None:
        lines += ["", f"Try --lr {report.suggestion.lr:.3g}"]
        if alpha is not None:
            lines[-1] += f", or --alpha {alpha.alpha:.3g} (measured KL {alpha.kl:.3g})"
    return "\n".join(lines)


def _json(report: sa.grpo.Preflight, alpha: Alpha | None) -> str:
    """JSON has no infinity: null."""
    whole: dict[str, Any] = {**asdict(report), "alpha": None if alpha is None else asdict(alpha)}
    return strict(whole)
