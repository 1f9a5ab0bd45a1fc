"""GRPO here and in TRL's GRPOTrainer on a CPU: completions a second, and where the time goes.

    python benchmarks/grpo_cpu.py            about ten minutes; writes the JSON
    python benchmarks/grpo_cpu.py --smoke    one round of a tiny model, to see that it runs
    python benchmarks/grpo_cpu.py --table    the table of docs/grpo_cpu.md from the JSON

Needs TRL (pip install trl datasets). All train the same adapter layers, LoRA of this library, in
the same random Llama in fp32, on the same prompts, with the same group size, reward, loss (DAPO),
AdamW and number of updates, one for each batch of completions; beta is 0, nothing is logged.

ours            `structadapt.grpo.train` on a transformers model, its options at their defaults
ours, shared    with share_prompts=True: a prompt runs once for its group
TRL             `GRPOTrainer`, generation by transformers; gradient checkpointing off

Two cases: prompts of 24 to 40 tokens, about twice a completion, and of 112 to 144, as with a few
examples in the prompt.

A random model would never end a completion. Here all embeddings have one coordinate in common,
and the head's row of the end-of-sequence token reads it, so that each token ends the completion
with a probability of about 1/16: lengths are ragged, 32 tokens at most.

A round has a seed of its own, and trains each of them from the same start, in random order, for one
step that does not count and a few that do. Timed is everything from one step's end to the next
one's: data, sampling, rewards, update. Not timed: making the model, the optimizer, the trainer. The
table shows medians over rounds, and of the rounds' ratios to TRL the median and the 20th and 80th
percentile. With one thread, the ratios of the process's CPU time say the same, and other programs
disturb them less.

rollout   Sampling and rewards.
update    Log-probabilities, loss, backward, clipping, optimizer; here also the KL after it.
rest      What lies between.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import script
import torch
from torch import nn

import structadapt as sa

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "grpo_cpu.json"
PAD, EOS, UNKNOWN = 0, 1, 2
END_PROBABILITY, COMMON = 1 / 16, 1.0  # of each token; the embeddings' common coordinate
PEER = "TRL"


@dataclass(frozen=True)
class Case:
    layers: int = 4
    width: int = 256
    vocabulary: int = 2048
    rank: int = 8
    prompts_per_step: int = 8
    group_size: int = 8
    prompt_tokens: tuple[int, int] = (24, 40)
    max_new_tokens: int = 32
    lr: float = 1e-4
    steps: int = 2  # that count, in a round
    rounds: int = 7
    threads: int = 1
    seed: int = 0


CASES = {"short prompts": Case(), "long prompts": Case(prompt_tokens=(112, 144))}
SMOKE = {
    name: replace(
        case, layers=1, width=32, vocabulary=64, prompts_per_step=2, group_size=4, steps=1, rounds=1
    )
    for name, case in CASES.items()
}


@dataclass(frozen=True)
class Timing:
    """The steps that count, of one contestant in one round."""

    seconds: float
    cpu_seconds: float  # of the process
    rollout: float
    update: float
    completions: int
    tokens: int
    updates: int

    @property
    def rest(self) -> float:
        return self.seconds - self.rollout - self.update


# -- what all of them train ------------------------------------------------------------------------


def make_model(case: Case) -> nn.Module:
    """A random Llama in fp32 with LoRA, whose completions end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(case.seed)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.width * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = COMMON
        probe = torch.randint(3, case.vocabulary, (64, 32))
        hidden = model.model(probe).last_hidden_state.flatten(0, 1)
        others = model.lm_head(hidden)[:, 3:].logsumexp(-1).mean()
        wanted = torch.tensor(END_PROBABILITY).logit() + others
        model.lm_head.weight[:3] = 0  # neither pad nor unknown
        model.lm_head.weight[EOS, 0] = wanted / hidden[:, 0].mean()
        model.lm_head.weight[[PAD, UNKNOWN], 0] = -20 / hidden[:, 0].mean()
    return sa.adapt(model, sa.LoRA(rank=case.rank), seed=case.seed)


def make_tokenizer(case: Case) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, case.vocabulary))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def make_prompts(case: Case) -> list[str]:
    """Enough for a round, of unequal lengths."""
    rng = random.Random(case.seed)
    count = case.prompts_per_step * (case.steps + 1)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(3, case.vocabulary)}" for _ in range(number))

    return [words(rng.randint(*case.prompt_tokens)) for _ in range(count)]


def reward(prompt: str, completion: str) -> float:
    """The share of words with an even number; differs within almost any group."""
    words = completion.split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


# -- contestants -----------------------------------------------------------------------------------


def ours(case: Case, folder: Path, share_prompts: bool = False) -> Timing:
    model, tokenizer = make_model(case), make_tokenizer(case)
    parameters = list(sa.adapter_parameters(model))
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=case.lr, weight_decay=0.0)
    config = sa.grpo.Config(
        eos_token_id=EOS,
        pad_token_id=PAD,
        group_size=case.group_size,
        prompts_per_step=case.prompts_per_step,
        max_new_tokens=case.max_new_tokens,
        share_prompts=share_prompts,
        seed=case.seed,
    )
    run = sa.grpo.train(
        model, optimizer, make_prompts(case), reward, config, tokenizer=tokenizer,
        rollout_context=lambda: sa.merged(model),
    )  # fmt: skip
    next(run)
    began, used = time.perf_counter(), time.process_time()
    steps = list(run)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    check_moved(start, parameters)
    completions = len(steps) * case.prompts_per_step * case.group_size
    return Timing(
        seconds,
        used,
        sum(step.rollout_seconds for step in steps),
        sum(step.update_seconds for step in steps),
        completions,
        round(sum(step.length for step in steps) * case.prompts_per_step * case.group_size),
        sum(step.updates for step in steps),
    )


def ours_shared(case: Case, folder: Path) -> Timing:
    return ours(case, folder, share_prompts=True)


def trl(case: Case, folder: Path) -> Timing:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig

    model = make_model(case)
    parameters = list(sa.adapter_parameters(model))
    start = [p.detach().clone() for p in parameters]
    batch = case.prompts_per_step * case.group_size
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_generations=case.group_size,
        max_completion_length=case.max_new_tokens,
        max_steps=case.steps + 1,
        beta=0.0,
        loss_type="dapo",
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=case.seed,
    )
    trainer = watched_trainer()(
        model=model,
        reward_funcs=lambda prompts, completions, **_: [*map(reward, prompts, completions)],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in make_prompts(case)]),
        processing_class=make_tokenizer(case),
    )
    trainer.train()
    check_moved(start, parameters)
    return trainer.timing()


def watched_trainer() -> Any:
    """GRPOTrainer with a clock: what it does is its own."""
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []  # of the steps
            self.updates: list[float] = []  # from the start of the training step to its optimizer's
            self.began = 0.0

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.updates.append(time.perf_counter() - self.began)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

    class Watched(GRPOTrainer):
        def __init__(self, **options: Any) -> None:
            self.clock = Clock()
            super().__init__(**options, callbacks=[self.clock])
            self.remove_callback(PrinterCallback)
            self.rollouts: list[tuple[float, int, int]] = []

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            self.clock.began = time.perf_counter()
            loss = super().training_step(*arguments, **options)
            assert torch.isfinite(loss), f"TRL's loss is {loss}"
            return loss

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            mask = found["completion_mask"]
            self.rollouts.append((time.perf_counter() - began, len(mask), int(mask.sum())))
            return found

        def timing(self) -> Timing:
            """The first step does not count."""
            (began, used), (ended, used_then) = self.clock.ends[0], self.clock.ends[-1]
            rollout, completions, tokens = map(sum, zip(*self.rollouts[1:], strict=True))
            updates = self.clock.updates[1:]
            return Timing(
                ended - began, used_then - used, rollout, sum(updates) - rollout, completions,
                tokens, len(updates),
            )  # fmt: skip

    return Watched


def check_moved(start: list[torch.Tensor], parameters: list[nn.Parameter]) -> None:
    """Training has to have changed every tensor, and left it finite."""
    for before, now in zip(start, parameters, strict=True):
        assert torch.isfinite(now).all(), "a parameter is not finite"
        assert not torch.equal(before, now), "a parameter did not move"


CONTESTANTS: dict[str, Callable[[Case, Path], Timing]] = {
    "ours": ours,
    "ours, shared": ours_shared,
    PEER: trl,
}


# -- the measurement -------------------------------------------------------------------------------


def measure(cases: dict[str, Case], shared: bool) -> dict[str, Any]:
    here = machine.record(("structadapt", "torch", "transformers", "trl", "accelerate"))
    here["capability"] = torch.backends.cpu.get_cpu_capability()
    here["shared_with_other_programs"] = shared
    return {
        "machine": here,
        "cases": {name: measure_case(name, case) for name, case in cases.items()},
    }


def measure_case(label: str, case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    rng = random.Random(case.seed)
    timings: dict[str, list[Timing]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(case.rounds):
            for name in rng.sample([*CONTESTANTS], len(CONTESTANTS)):
                seeded = replace(case, seed=case.seed + number)
                timings[name].append(CONTESTANTS[name](seeded, Path(scratch)))
            said = ", ".join(
                f"{name} {found[-1].completions / found[-1].seconds:.1f}"
                for name, found in timings.items()
            )
            print(
                f"{label}, round {number + 1}, completions/s: {said}", file=sys.stderr, flush=True
            )
    check_same_work(case, timings)
    return {
        "case": asdict(case),
        "timings": {name: [asdict(t) for t in found] for name, found in timings.items()},
    }


def check_same_work(case: Case, timings: dict[str, list[Timing]]) -> None:
    """The same updates and completions, and lengths that agree but for chance."""
    lengths = {}
    for name, found in timings.items():
        expected = case.steps * case.prompts_per_step * case.group_size
        assert all(t.completions == expected for t in found), f"{name}: not {expected} completions"
        assert all(t.updates == case.steps for t in found), f"{name}: not {case.steps} updates"
        lengths[name] = sum(t.tokens for t in found) / sum(t.completions for t in found)
    # A length's deviation is about its mean: four deviations of the difference of two means.
    chance = 4 * math.sqrt(2 / (case.rounds * case.steps * case.prompts_per_step * case.group_size))
    apart = max(lengths.values()) / min(lengths.values()) - 1
    assert apart < max(chance, 0.1) or case.rounds == 1, f"lengths differ: {lengths}"


def ratios(results: dict[str, Any], name: str, clock: str = "seconds") -> list[float]:
    """Completions a second over TRL's, round by round, the smallest first."""
    pairs = zip(results["timings"][name], results["timings"][PEER], strict=True)
    return sorted(b[clock] / a[clock] for a, b in pairs)  # of equally many completions


def times(results: dict[str, Any], name: str, clock: str) -> str:
    """Their median, with the 20th and the 80th percentile."""
    if name == PEER:
        return "1"
    r = ratios(results, name, clock)
    return f"{statistics.median(r):.2f} ({percentile(r, 0.2):.2f}–{percentile(r, 0.8):.2f})"


def percentile(ordered: list[float], share: float) -> float:
    """The value that `share` of the numbers do not exceed."""
    return ordered[round(share * (len(ordered) - 1))]


def table(results: dict[str, Any]) -> str:
    lines = [
        "| case | trained by | completions/s | tokens/s | times TRL (p20–p80) "
        "| by CPU time | rollout, ms a step | update | rest |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case, found in results["cases"].items():
        lines += [row(case, name, found) for name in found["timings"]]
    return "\n".join(lines)


def row(case: str, name: str, results: dict[str, Any]) -> str:
    steps = results["case"]["steps"]
    timings = [Timing(**t) for t in results["timings"][name]]

    def middle(value: Callable[[Timing], float]) -> float:
        return statistics.median(map(value, timings))

    split = [
        f"{middle(part) / steps * 1e3:.0f}"
        for part in (lambda t: t.rollout, lambda t: t.update, lambda t: t.rest)
    ]
    return (
        f"| {case} | {name} | {middle(lambda t: t.completions / t.seconds):.0f} "
        f"| {middle(lambda t: t.tokens / t.seconds):,.0f} "
        f"| {times(results, name, 'seconds')} | {times(results, name, 'cpu_seconds')} "
        f"| {' | '.join(split)} |"
    )


def main() -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--rounds", type=int, default=Case.rounds)
    parser.add_argument("--threads", type=int, default=Case.threads)
    parser.add_argument("--shared", action="store_true", help="say that other programs ran beside")
    options = parser.parse_args()
    own = {"rounds": options.rounds, "threads": options.threads}
    cases = {name: replace(case, **own) for name, case in CASES.items()}
    cases = SMOKE if options.smoke else cases
    script.show(options, RESULTS, lambda: measure(cases, options.shared), table)


if __name__ == "__main__":
    main()
