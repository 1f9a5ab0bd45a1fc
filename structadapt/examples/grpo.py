"""Train a tiny language model to add with GRPO, through an adapter of your choice.

A 0.4 M-parameter character model learns three-digit addition from examples until it solves a
fifth of the held-out problems, then goes once through 8192 prompts with GRPO and nothing but the
reward "is the sum right". Takes a minute or two on two CPU cores.

    structadapt grpo                                     LoRA, rank 8
    structadapt grpo --adapter quanta --out runs/q       QuanTA, three axes
    structadapt grpo --rank 256 --alpha 512              watch a rank collapse
    structadapt grpo --json | jq .after.sampled          the result for a program

Ctrl-C ends the step and saves; the same command with the same --out goes on.

exit codes:
    0    done, also where the policy collapsed
    1    the run diverged, or could not write
    2    bad input, nothing was begun
    130  Ctrl-C
"""

import argparse
import contextlib
import copy
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt import terminal
from structadapt.adapters import Adapter
from structadapt.examples import evaluating, monitoring, show, tiny_lm
from structadapt.examples.options import (
    Settings,
    build_adapter,
    check_same,
    directory,
    learning_rate,
)
from structadapt.examples.process import StepLog, first_interrupt, peak_memory_mib, strict
from structadapt.examples.show import collapsed_at
from structadapt.files import write_atomically
from structadapt.layers import find_adapted

EVAL_EVERY = 16  # steps
CURVE_PROBLEMS, END_PROBLEMS = 300, 1000  # held-out, for the curve and for the table
MAX_PARAMETERS = 20_000_000


def main(args: argparse.Namespace) -> int:
    """Run the example. Returns the exit code."""
    names = Settings.__dataclass_fields__
    settings = Settings(**{k: v for k, v in vars(args).items() if k in names})
    progress = show.Progress(quiet=terminal.is_quiet(args))
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # a tiny model gains nothing from more
    try:
        run = Run.prepare(settings)
    except (ValueError, OSError) as error:
        terminal.say("structadapt grpo", "error", error)
        return 2
    try:
        with first_interrupt(progress.quiet) as interrupted:
            summary = run.execute(progress, interrupted)
    except OSError as error:  # a full disk
        terminal.say("structadapt grpo", "error", error)
        return 1
    terminal.show(strict(summary) if args.json else show.result(summary, run.out))
    return 130 if summary["interrupted"] else 1 if summary["failure"] else 0


@dataclass
class Run:
    """One run of the example: a model, an adapter on it, a directory for what comes out."""

    settings: Settings
    adapter: Adapter | None  # None: full fine-tuning
    model: tiny_lm.TinyLM
    config: sa.grpo.Config
    out: Path
    going_on: bool = False  # with the run that was stopped in `out`

    @classmethod
    def prepare(cls, settings: Settings) -> "Run":
        """Check everything that can be checked, then make the directory.

        Raises ValueError for settings that make no sense, OSError for a directory that cannot be
        made, or exists and does not hold this run, stopped before its end.
        """
        settings.check()
        adapter = build_adapter(settings)
        torch.manual_seed(settings.seed)
        model = tiny_lm.TinyLM()
        if settings.load is not None:
            sa.load(copy.deepcopy(model), settings.load)
        elif adapter is not None:
            plan = sa.plan(model, adapter, settings.layers)
            if plan.parameters > MAX_PARAMETERS:
                raise ValueError(
                    f"{adapter} trains {plan.parameters:,} parameters of a model that has "
                    f"{plan.base_parameters:,}: choose something smaller"
                )
        config = sa.grpo.Config(
            eos_token_id=tiny_lm.EOS,
            pad_token_id=tiny_lm.EOS,
            max_new_tokens=tiny_lm.ANSWER_TOKENS,
            minibatches=4,
            share_prompts=True,
            seed=settings.seed,
        )
        run = cls(settings, adapter, model, config, directory(settings))
        run.going_on = check_same(run.out, run._describe())
        return run

    def execute(self, progress: show.Progress, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Cold start, GRPO, evaluation; writes every file of the directory."""
        began = time.perf_counter()
        self._write("config.json", self._describe())
        if self.going_on and self._states.path.is_dir():  # which the cold start came before
            base = safetensors.torch.load_file(self.out / "base.safetensors")
            self.model.load_state_dict(base)
        else:
            self._cold_start(progress, interrupted)
            base = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            write_atomically(self.out / "base.safetensors", safetensors.torch.save(base))
        parameters = self._adapt()
        if not self.going_on:
            self._save()
        cold = time.perf_counter()

        before = None if interrupted() else self._accuracy()
        monitor = monitoring.watch(self.model, self.settings.monitor, self.adapter is None)
        steps, failure = self._grpo(parameters, monitor, progress, interrupted)
        after = None if interrupted() or failure else self._accuracy()
        done = time.perf_counter()

        picture, title = self.out / "curves.png", str(self.adapter or "full")
        progress.say(show.curves(steps, monitoring.history(monitor), picture, title))
        summary = {
            "adapter": repr(self.adapter) if self.adapter else "full fine-tuning",
            "parameters": sum(p.numel() for p in parameters),
            "before": before,
            "after": after,
            "collapsed_at": collapsed_at(steps),
            "monitor": monitoring.summary(monitor),
            "dead_steps": [s["step"] for s in steps if s["updates"] == 0],
            "steps": len(steps),
            "interrupted": interrupted(),
            "failure": failure,
            "seconds": {"cold_start": cold - began, "grpo": done - cold},
            "peak_memory_mib": peak_memory_mib(),
            "spectra": sa.spectra.analyze(self.model, None if self.adapter else base).rows,
        }
        self._write("summary.json", summary)
        if not summary["interrupted"]:
            shutil.rmtree(self._states.path, ignore_errors=True)
        return summary

    # -- the stages --------------------------------------------------------------------------------

    def _cold_start(self, progress: show.Progress, interrupted: Callable[[], bool]) -> None:
        target, seed, reached = self.settings.cold_start, self.settings.seed, 0.0
        if target == 0:
            return
        lessons = tiny_lm.lessons(seed)
        for step, loss, seen in tiny_lm.cold_start(self.model, self._sampled, target, lessons):
            reached = reached if seen is None else seen
            progress.cold_start(step, loss, seen, target)
            if interrupted():
                return
        if reached < target:
            progress.say(f"the cold start ends at {reached:.3f}, short of {target:.2f}")

    def _adapt(self) -> list[nn.Parameter]:
        """Put the adapter on; returns what the optimizer trains."""
        if self.adapter is None:
            return list(self.model.parameters())
        if self.settings.load is not None:
            sa.load(self.model, self.settings.load)
        else:
            sa.adapt(self.model, self.adapter, self.settings.layers, seed=self.settings.seed)
        return list(sa.adapter_parameters(self.model))

    def _grpo(
        self,
        parameters: list[nn.Parameter],
        monitor: sa.spectra.Monitor | None,
        progress: show.Progress,
        interrupted: Callable[[], bool],
    ) -> tuple[list[dict[str, Any]], str | None]:
        """One epoch: every step's record, written to metrics.jsonl as it comes, and what ended it
        before its time, if it diverged."""
        config, settings = self.config, self.settings
        rng = random.Random(f"grpo {settings.seed}")
        prompts = list(islice(tiny_lm.problems(rng, held_out=False), settings.prompts))
        total = sa.grpo.steps_in(len(prompts), config)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate(settings), weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total * config.minibatches)
        run = sa.grpo.train(
            self.model,
            optimizer,
            prompts,
            sa.grpo.exact_match,
            config,
            tokenizer=tiny_lm.CharTokenizer(),
            rollout_context=self._rollout_context,
            scheduler=decay,
            observers=[monitor] if monitor else [],
            checkpoints=self._states,
        )
        self._states.reopen()  # here summary.json says what is finished
        log, failure = StepLog(self.out / "metrics.jsonl"), None
        readings = monitoring.ReadingLog(monitor, self.out / "monitor.jsonl")
        try:
            while not interrupted() and (record := next(run, None)) is not None:
                look = (record.step + 1) % EVAL_EVERY == 0 or record.step + 1 == total
                held_out = self._sampled() if look else None
                log.add({**asdict(record), "held_out": held_out})
                readings.write()
                progress.step(log.records[-1], total)
                if look or interrupted():
                    self._save()
        except FloatingPointError as error:  # not finite: a gradient, or the logits
            failure = str(error)
        readings.write()
        progress.close()
        return log.records, failure

    def _save(self) -> None:
        if self.adapter is not None:
            sa.save(self.model, self.out / "adapter.safetensors")
        else:
            data = safetensors.torch.save(self.model.state_dict())
            write_atomically(self.out / "model.safetensors", data)

    # -- helpers -----------------------------------------------------------------------------------

    @property
    def _states(self) -> sa.grpo.Checkpoints:
        return sa.grpo.Checkpoints(self.out / "states", every=EVAL_EVERY)

    def _rollout_context(self) -> contextlib.AbstractContextManager[None]:
        adapted = find_adapted(self.model)  # not yet, in the cold start
        return sa.merged_if_exact(self.model) if adapted else contextlib.nullcontext()

    def _evaluated(self, how: Callable[..., Any], use: str, count: int) -> Any:
        """What `how` finds on some of the held-out problems; a use has its own."""
        held_out = tiny_lm.problems(random.Random(f"held out, {use}"), held_out=True)
        return how(
            self.model,
            list(islice(held_out, count)),
            sa.grpo.exact_match,
            self.config,
            tokenizer=tiny_lm.CharTokenizer(),
            rollout_context=self._rollout_context,
        )

    def _sampled(self) -> float:
        """Sampled accuracy, for the curve."""
        how = partial(sa.grpo.evaluate, seed=self.settings.seed)
        return self._evaluated(how, "curve", CURVE_PROBLEMS).mean

    def _accuracy(self) -> dict[str, Any]:
        """Accuracy, for the table."""
        return self._evaluated(evaluating.accuracy, "end", END_PROBLEMS)

    def _describe(self) -> dict[str, Any]:
        return {
            "settings": asdict(replace(self.settings, out=str(self.out))),
            "adapter": type(self.adapter).__name__ if self.adapter else "full",
            "adapter_config": self.adapter.config() if self.adapter else {},
            "lr": learning_rate(self.settings),
            "grpo": asdict(self.config),
            "model_parameters": sum(p.numel() for p in self.model.parameters()),
            "versions": {
                "structadapt": version("structadapt"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
        }

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.out / name, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    from structadapt.cli import main as command_line

    sys.exit(command_line(["grpo", *sys.argv[1:]]))
