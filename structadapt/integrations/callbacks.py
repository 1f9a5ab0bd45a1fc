"""Callbacks for transformers' Trainer and its subclasses, TRL's among them.

    callbacks = [AdapterCheckpoint(every=100, keep=3), NonFiniteGuard()]
    Trainer(model=sa.adapt(model, sa.LoRA()), args=TrainingArguments(save_strategy="no", ...), ...)

A callback and not a Trainer subclass, so that it goes into any trainer unchanged; it uses the
public hooks and the layout of a checkpoint on disk, and leaves Trainer's own saving off, which
writes the whole base model of a plain model.
"""

import random
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from structadapt.adapter_file import is_adapter_file, read_adapters
from structadapt.checkpoint import refuse_misfit, save
from structadapt.files import sync, take_place
from structadapt.integrations.guard import NonFiniteGradientError, NonFiniteGuard
from structadapt.layers import find_adapted, unwrapped

__all__ = ["AdapterCheckpoint", "NonFiniteGradientError", "NonFiniteGuard"]

WEIGHTS = "model.safetensors"  # where Trainer looks when it resumes


class AdapterCheckpoint(TrainerCallback):
    """Write checkpoint-N every `every` steps and after the last: adapters, no base model.

    It holds what `train(resume_from_checkpoint=...)` needs to go on as if never interrupted:
    adapters, optimizer, scheduler, gradient scaler, random generators of every rank, trainer state.
    The adapters are a `structadapt.save` file named model.safetensors (of a PeftModel:
    adapter_model.safetensors as PEFT writes it). Written beside and renamed: a directory named
    checkpoint-N is whole, whatever happens.

    Only the newest `keep` are kept, all with None; checkpoints of later steps, which another run
    has left, are not touched, and warned of. Evaluation draws from the random generators, so a step
    that is evaluated is saved after it.

    Raises ValueError when training begins with Trainer's own saving on, or under FSDP or DeepSpeed,
    whose shards only Trainer can save: there use the PEFT bridge and `save_strategy`.
    AdapterFileError (a ValueError) when it resumes from a checkpoint in `output_dir` whose adapters
    are damaged, others than the model's or were trained over another base.
    """

    def __init__(self, every: int = 500, keep: int | None = 3) -> None:
        for name, value in (("every", every), ("keep", 1 if keep is None else keep)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"AdapterCheckpoint: {name} must be at least 1, got {value!r}")
        self.every, self.keep = every, keep
        self._due = False
        self._written = 0  # the last step saved or resumed from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if not find_adapted(model):
            raise ValueError("AdapterCheckpoint: the model has no adapted layer: call adapt first")
        if getattr(args.save_strategy, "value", args.save_strategy) != "no":
            raise ValueError(
                f'AdapterCheckpoint: save_strategy is {args.save_strategy!r}; set it to "no", or '
                "Trainer writes checkpoints of its own"
            )
        if args.deepspeed or args.fsdp:
            raise ValueError(
                "AdapterCheckpoint cannot save the shards of FSDP or DeepSpeed: train a PeftModel "
                "(structadapt.integrations.peft_tuner) with Trainer's own save_strategy"
            )
        self._due, self._written = False, state.global_step
        root = Path(args.output_dir or ".")
        if state.global_step:
            _refuse_other_adapters(model, root / f"checkpoint-{state.global_step}" / WEIGHTS)
        later = [path.name for step, path in _checkpoints(root) if step > state.global_step]
        if later:
            warnings.warn(
                f"{root} holds {', '.join(later)} of another run, from which "
                "resume_from_checkpoint=True would go on: use an output_dir of its own",
                stacklevel=2,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = state.global_step % self.every == 0
        if not control.should_evaluate and not control.should_log:
            self._write_if_due(args, state, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not control.should_evaluate:
            self._write_if_due(args, state, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_if_due(args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = state.global_step > self._written
        self._write_if_due(args, state, **kwargs)

    def _write_if_due(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        if not self._due:
            return
        self._due, self._written = False, state.global_step
        root = Path(args.output_dir or ".")
        final = root / f"checkpoint-{state.global_step}"
        if args.should_save:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".checkpoint-*"):  # of a run that was killed
                shutil.rmtree(leftover)
        temporary = root / _shared_name(f".{final.name}", args.world_size)
        temporary.mkdir(parents=True, exist_ok=True)
        _write_rng(temporary, args)
        if args.should_save:
            _write_training(temporary, state, **kwargs)
        _barrier(args.world_size)
        if args.should_save:
            _publish(temporary, final)
            self._forget(root, state.global_step)
        _barrier(args.world_size)

    def _forget(self, root: Path, step: int) -> None:
        """Remove all checkpoints up to this step but the newest."""
        paths = [path for number, path in _checkpoints(root) if number <= step]
        for path in paths[: -self.keep] if self.keep else []:
            hidden = path.with_name(f".{path.name}.old")  # never half there under its name
            path.rename(hidden)
            shutil.rmtree(hidden)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, path), earliest first."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in root.glob("checkpoint-*")]
    return sorted((int(number), path) for number, path in numbered if number.isdigit())


def _refuse_other_adapters(model: torch.nn.Module, path: Path) -> None:
    """AdapterFileError if Trainer, which checks names and shapes alone, has loaded what is not the
    model's. A PeftModel checks its own."""
    if path.is_file() and is_adapter_file(path):
        refuse_misfit(unwrapped(model), read_adapters(path), path)


def _write_training(folder: Path, state: TrainerState, **kwargs: Any) -> None:
    model, optimizer = kwargs["model"], kwargs["optimizer"]
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model.save_pretrained(folder)
    else:
        save(model, folder / WEIGHTS)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(kwargs["lr_scheduler"].state_dict(), folder / "scheduler.pt")
    if getattr(optimizer, "scaler", None) is not None:
        torch.save(optimizer.scaler.state_dict(), folder / "scaler.pt")
    state.save_to_json(str(folder / "trainer_state.json"))


def _write_rng(folder: Path, args: TrainingArguments) -> None:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    distributed = args.world_size > 1
    if torch.cuda.is_available():
        cuda = torch.cuda
        states["cuda"] = cuda.get_rng_state_all() if distributed else cuda.get_rng_state()
    name = f"rng_state_{args.process_index}.pth" if distributed else "rng_state.pth"
    torch.save(states, folder / name)


def _publish(temporary: Path, final: Path) -> None:
    """Give a whole directory its name; it survives a crash of the machine from here on."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    take_place(temporary, final)  # of one from before an interruption, too
    sync(final.parent)


def _shared_name(stem: str, world_size: int) -> str:
    """A name that no other call uses, the same on every rank."""
    box = [f"{stem}.{secrets.token_hex(4)}"]
    if world_size > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()
