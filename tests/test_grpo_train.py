"""The loop: one update is the update, whatever the micro-batches; dead batches move nothing."""

import contextlib
import copy
import math
from dataclasses import fields

import pytest
import torch
from torch import nn

import structadapt as sa
from structadapt.examples import tiny_lm
from structadapt.grpo import objective
from structadapt.grpo.evaluation import wilson
from structadapt.grpo.noise import uniforms
from structadapt.grpo.rollout import generate, logprobs

EOS = 0


class Plain(nn.Module):
    """No cache, positions and mask by position; with dropout, to see in which mode it runs."""

    def __init__(self, vocab: int = 8) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(vocab, 16), nn.Linear(16, 32)
        self.drop, self.head = nn.Dropout(0.0), nn.Linear(32, vocab)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, ids, mask, position_ids):
        self.modes.append((self.training, torch.is_grad_enabled()))
        x = (self.embed(ids) * mask[..., None]).cumsum(1) / (1 + position_ids[..., None])
        return self.head(self.drop(torch.tanh(self.up(x))))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain()


PROMPTS = [[1, 2], [3], [4, 5, 6], [2, 2], [7]]


def count_fives(prompt, completion):
    return completion.count(5) / 6


def run(model, reward=count_fives, prompts=PROMPTS, optimizer=None, options=None, **config):
    defaults = {"eos_token_id": EOS, "max_new_tokens": 6, "group_size": 4, "prompts_per_step": 5}
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
    config = sa.grpo.Config(**(defaults | config))
    return list(sa.grpo.train(model, optimizer, prompts, reward, config, **(options or {})))


def noise(prompts, tokens):
    """That of the first step with seed 0, for groups of four."""
    return uniforms([(0, 0, p, i) for p in range(prompts) for i in range(4)], tokens)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_micro_batches_give_the_same_update(plain, kind, make):
    results = []
    for size in (None, 1, 3, 7):
        model = copy.deepcopy(plain)
        optimizer = make(model.parameters(), lr=1e-2)
        steps = run(model, optimizer=optimizer, loss=kind, micro_batch_size=size, minibatches=2)
        results.append((model.state_dict(), steps[0]))
    whole, step = results[0]
    assert step.updates == 2 and not torch.equal(whole["head.weight"], plain.head.weight)
    for other, other_step in results[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)
        assert other_step.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
        assert other_step.kl == pytest.approx(step.kl, rel=1e-3)
        assert other_step.clip_fraction == step.clip_fraction


def test_micro_batches_give_the_same_update_through_every_adapter(adapter):
    torch.manual_seed(0)
    base = tiny_lm.TinyLM(width=32, layers=1, heads=2)
    results = []
    for size in (None, 1, 3, 7):
        model = sa.adapt(copy.deepcopy(base), adapter)
        optimizer = torch.optim.SGD(sa.adapter_parameters(model), lr=0.1)
        context = {"rollout_context": lambda model=model: sa.merged(model)}
        run(model, optimizer=optimizer, micro_batch_size=size, share_prompts=True, options=context)
        results.append(list(sa.adapter_parameters(model)))
        for name, tensor in base.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), f"{name} of the base changed"
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_update_is_the_gradient_of_the_objective(plain):
    """One step of SGD on one rollout, done by hand from the same samples."""
    by_hand = copy.deepcopy(plain)
    (step,) = run(plain, max_grad_norm=math.inf)
    prompts = [p for p in PROMPTS for _ in range(4)]
    options = {"eos_token_ids": [EOS], "max_new_tokens": 6, "noise": noise(5, 6)}
    rollout = generate(by_hand.eval(), prompts, **options)
    rewards = torch.tensor([c.count(5) / 6 for c in rollout.completions([EOS])]).view(5, 4)
    A = rewards - rewards.mean(1, keepdim=True)
    A = (A / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    logp, _ = logprobs(by_hand, rollout)
    objective = (A[:, None] * (logp - logp.detach()).exp() * rollout.mask).sum()
    (-objective / rollout.mask.sum()).backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm().item()
    for actual, start in zip(plain.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(actual, start - start.grad, rtol=1e-4, atol=1e-6)

    assert step.grad_norm == pytest.approx(norm, rel=1e-4)
    assert step.reward == pytest.approx(rewards.mean().item(), rel=1e-6)
    assert step.reward_std == pytest.approx(rewards.std().item(), rel=1e-6)
    equal = (rewards == rewards[:, :1]).all(1).float().mean().item()
    assert step.zero_std_fraction == pytest.approx(equal)
    assert step.length == pytest.approx(rollout.mask.sum().item() / 20)
    assert step.truncated == pytest.approx(rollout.truncated.float().mean().item())
    tokens = rollout.mask.sum()
    assert step.entropy == pytest.approx((rollout.entropy.sum() / tokens).item(), rel=1e-5)
    with torch.no_grad():
        log_ratio = (logprobs(plain, rollout)[0] - rollout.logp) * rollout.mask
    kl = ((log_ratio.exp() - 1 - log_ratio).sum() / tokens).item()
    assert step.kl == pytest.approx(kl, rel=1e-4) and kl > 0
    assert step.mismatch < 1e-5 and step.clip_fraction == 0.0
    assert (step.step, step.prompts, step.updates) == (0, 5, 1)
    assert step.tokens_per_second > 0 and step.rollout_seconds > 0 and step.update_seconds > 0


def first_two_equal(prompt, completion):
    """The first minibatch of three, two groups, has no advantage."""
    return 0.5 if prompt in ([1, 2], [3]) else completion.count(5) / 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "grpo"},
        {"loss": "dr_grpo", "advantage": "none"},
        {"advantage": "batch"},
        {"temperature": 0.6},
        {"clip_low": 0.01, "clip_high": 0.5},
        {"max_grad_norm": 0.05},
    ],
    ids=str,
)
def test_every_option_by_hand(plain, options):
    """Three minibatches, the first without advantage, with momentum and stale gradients around."""
    prompts = [*PROMPTS, [6]]
    fixed = {"eos_token_id": 0, "max_new_tokens": 9, "group_size": 4, "prompts_per_step": 6}
    config = sa.grpo.Config(**(fixed | {"minibatches": 3, "max_grad_norm": math.inf} | options))
    hand = copy.deepcopy(plain)
    optimizers = []
    for model in (plain, hand):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers[-1].step()
    (step,) = sa.grpo.train(plain, optimizers[0], prompts, first_two_equal, config)

    repeated = [p for p in prompts for _ in range(4)]
    rollout = generate(hand, repeated, eos_token_ids=[0], max_new_tokens=9,
                       temperature=config.temperature, noise=noise(6, 9))  # fmt: skip
    completions = zip(repeated, rollout.completions([0]), strict=True)
    rewards = torch.tensor([first_two_equal(*pair) for pair in completions]).view(6, 4)
    A = sa.grpo.advantages(rewards, config.advantage).flatten()
    norms, clipped = [], 0.0
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        part = rollout[rows]
        if not A[rows].any():
            continue
        optimizers[1].zero_grad()
        logp, _ = logprobs(hand, part, config.temperature)
        policy = (logp, part.logp, A[rows], part.mask)
        clip = (config.clip_low, config.clip_high)
        sa.grpo.loss(*policy, config.loss, *clip, max_tokens=9).backward()
        clipped += objective.clipped(*policy, config.loss, *clip).sum().item()
        norms.append(nn.utils.clip_grad_norm_(hand.parameters(), config.max_grad_norm).item())
        optimizers[1].step()
    assert step.updates == len(norms) == 2
    for left, right in zip(plain.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert step.grad_norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert step.clip_fraction == pytest.approx(clipped / rollout.mask.sum().item())
    first = rollout[:8]
    with torch.no_grad():
        log_ratio = (logprobs(hand, first, config.temperature)[0] - first.logp) * first.mask
    kl = ((log_ratio.exp() - 1 - log_ratio).sum() / first.mask.sum()).item()
    assert step.kl == pytest.approx(kl, rel=1e-3)


def test_minibatches_are_as_many_as_asked_for(plain):
    for minibatches in (1, 2, 4, 7, 20, 33):
        (step,) = run(copy.deepcopy(plain), advantage="batch", minibatches=minibatches,
                      reward=lambda p, c: len(c) + 0.1 * sum(c))  # fmt: skip
        assert min(minibatches, 20) - 8 <= step.updates <= min(minibatches, 20)
        assert minibatches > 7 or step.updates == minibatches


def test_mismatch_is_the_gap_between_sampler_and_trainer(plain):
    """Also where masked positions have a log-probability of -inf: the pad token is ruled out."""
    with torch.no_grad():
        plain.head.bias[6] = -torch.inf

    @contextlib.contextmanager
    def another_policy():
        plain.head.bias.data[5] += 1.0
        yield
        plain.head.bias.data[5] -= 1.0

    twin = copy.deepcopy(plain)
    (step,) = run(plain, options={"rollout_context": another_policy}, pad_token_id=6)
    trainer = copy.deepcopy(twin)
    twin.head.bias.data[5] += 1.0
    prompts = [p for p in PROMPTS for _ in range(4)]
    rollout = generate(twin, prompts, eos_token_ids=[EOS], max_new_tokens=6, noise=noise(5, 6))
    gap = (logprobs(trainer, rollout)[0] - rollout.logp)[rollout.mask.bool()].abs().max().item()
    assert step.mismatch == pytest.approx(gap, rel=1e-4) and gap > 0.1


def test_gradients_outside_the_optimizer_do_not_pile_up(plain):
    optimizer = torch.optim.SGD(plain.head.parameters(), lr=0.1)
    run(plain, optimizer=optimizer, prompts=PROMPTS * 2)
    assert all(parameter.grad is None for parameter in plain.parameters())


@pytest.mark.parametrize(
    "reward, config",
    [(lambda p, c: 0.7, {}), (lambda p, c: 0.0, {}), (count_fives, {"group_size": 1})],
    ids=["all 0.7", "all 0", "groups of one"],
)
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("advantage", ["group", "batch", "none"])
def test_equal_rewards_move_nothing(plain, reward, config, kind, advantage):
    before = state(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    run(plain, optimizer=optimizer, prompts=PROMPTS[:1] * 5)  # fill AdamW's momentum
    assert not torch.equal(plain.head.weight, before["head.weight"])
    before = state(plain)
    for step in run(
        plain, reward, PROMPTS * 2, optimizer, loss=kind, advantage=advantage, **config
    ):
        assert step.grad_norm == 0.0 and step.kl == 0.0 and step.updates == 0
        assert step.zero_std_fraction == 1.0
        numbers = [getattr(step, f.name) for f in fields(step) if f.name != "alarms"]
        assert all(map(math.isfinite, numbers))
    assert_same_bits(state(plain), before)


def test_it_learns_with_a_plain_module_and_no_cache(plain):
    steps = run(plain, prompts=PROMPTS * 30, prompts_per_step=10, group_size=8)
    assert steps[0].reward < 0.2 < 0.6 < steps[-1].reward


def test_rollouts_run_in_eval_mode_and_updates_in_the_models_own(plain):
    plain.train()
    plain.drop.eval()
    plain.drop.p = 0.9
    run(plain)
    assert plain.training and not plain.drop.training
    assert set(plain.modes) == {(False, False), (True, True)}
    plain.modes.clear()
    run(plain.eval())
    assert set(plain.modes) == {(False, False), (False, True)} and not plain.training


def test_rollouts_run_within_their_context_and_updates_outside(plain):
    sa.adapt(plain, sa.LoRA(rank=2), "up")
    base = plain.up.weight.clone()
    inside = []
    plain.up.register_forward_hook(
        lambda *_: inside.append((plain.up.base_weight is not None, torch.is_grad_enabled()))
    )
    run(plain, options={"rollout_context": lambda: sa.merged(plain)})
    assert set(inside) == {(True, False), (False, True), (False, False)}
    assert torch.equal(plain.up.weight, base) and plain.up.base_weight is None


def test_tokens_after_the_end_and_the_pad_token_do_not_matter(plain):
    models = [copy.deepcopy(plain) for _ in range(2)]
    for model, pad in zip(models, (EOS, 6), strict=True):
        run(model, pad_token_id=pad)
    for left, right in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_the_same_seed_gives_the_same_run_and_no_global_state(plain):
    state_before = torch.get_rng_state()
    models = [copy.deepcopy(plain) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model, seed=seed)
    assert_same_bits(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[0].head.weight, models[2].head.weight)
    assert torch.equal(torch.get_rng_state(), state_before)


def test_every_prompt_once_and_a_short_last_step(plain):
    seen = []

    def reward(prompt, completion):
        seen.append(tuple(prompt))
        return 0.0

    steps = run(plain, reward, PROMPTS, prompts_per_step=2, group_size=3)
    assert seen == [tuple(p) for p in PROMPTS for _ in range(3)]
    assert [s.prompts for s in steps] == [2, 4, 5] and [s.step for s in steps] == [0, 1, 2]
    assert sa.grpo.steps_in(5, sa.grpo.Config(eos_token_id=0, prompts_per_step=2)) == 3


def test_prompts_and_rewards_of_every_form(plain):
    seen = []

    def reward(prompt, completion, meta):
        seen.append((prompt, type(completion), dict(meta)))
        return 1.0

    class Letters:
        def encode(self, text):
            return [ord(c) - ord("a") for c in text]

        def decode(self, ids):
            return "".join(chr(i + ord("a")) for i in ids)

    records = ["bc", {"prompt": "d", "answer": "x"}, {"prompt": [4, 5], "answer": "y"}]
    run(plain, reward, records, options={"tokenizer": Letters()}, group_size=1)
    assert seen == [
        ("bc", str, {}),
        ("d", str, {"prompt": "d", "answer": "x"}),
        ("ef", str, {"prompt": [4, 5], "answer": "y"}),
    ]
    seen.clear()
    run(plain, lambda p, c, strict=False: reward(p, c, {"strict": strict}), [[1]], group_size=1)
    run(plain, lambda p, c, meta=None: reward(p, c, meta), [{"prompt": [2]}], group_size=1)
    assert seen == [([1], list, {"strict": False}), ([2], list, {"prompt": [2]})]
    seen.clear()
    run(plain, lambda *a: reward(*a), [[1, 2], (3,), torch.tensor([4])], group_size=1)
    assert [s[:2] for s in seen] == [([1, 2], list), ([3], list), ([4], list)]


def test_messages_go_through_the_chat_template(plain):
    class Chat:
        def apply_chat_template(self, messages, add_generation_prompt, return_dict):
            assert add_generation_prompt and not return_dict
            return [len(m["role"]) % 8 for m in messages] + [1]

        def decode(self, ids):
            return " ".join(map(str, ids))

    seen = []
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]

    def reward(prompt, completion, meta):
        seen.append((prompt, meta["answer"]))
        return len(completion)

    run(plain, reward, [{"prompt": messages, "answer": 3}], options={"tokenizer": Chat()})
    assert seen == [(messages, 3)] * 4
    with pytest.raises(ValueError, match="is messages: pass tokenizer= with a chat template"):
        run(plain, reward, [messages])


def test_exact_match():
    assert sa.grpo.exact_match("p", " 42\n", {"answer": 42}) == 1.0
    assert sa.grpo.exact_match("p", "43", {"answer": "42"}) == 0.0
    assert sa.grpo.exact_match([1], [4, 2], {"answer": (4, 2)}) == 1.0


def test_a_scheduler_steps_once_a_minibatch(plain):
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=6)
    options = {"scheduler": decay}
    run(plain, lambda p, c: len(c) + 0.1 * sum(c), PROMPTS[:4], optimizer, options,
        prompts_per_step=2, minibatches=3)  # fmt: skip
    assert decay.last_epoch == 6 and optimizer.param_groups[0]["lr"] == 0.0


def test_later_minibatches_are_off_policy(plain):
    optimizer = torch.optim.SGD(plain.parameters(), lr=30.0)
    steps = run(plain, prompts=PROMPTS * 4, optimizer=optimizer, minibatches=4, prompts_per_step=20)
    assert steps[0].updates == 4 and 0 < steps[0].clip_fraction < 1 and steps[0].mismatch < 1e-5


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, words",
    [
        ({"group_size": 1.5}, "group_size must be an integer, at least 1, got 1.5"),
        ({"pad_token_id": None}, "eos_token_id and pad_token_id must be integers"),
        ({"group_size": 0}, "group_size must be an integer, at least 1, got 0"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"minibatches": 0}, "minibatches"),
        ({"micro_batch_size": 0}, "micro_batch_size must be None or an integer"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"loss": "ppo"}, "loss must be one of .*'dapo'"),
        ({"advantage": "rank"}, "advantage must be one of"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"seed": -1}, "seed must be an integer, at least 0"),
        ({"max_resamples": -1}, "max_resamples"),
        ({"slots": 0}, "slots must be None or an integer"),
        ({"epochs": 0}, "epochs"),
        ({"kl": "k4"}, "kl must be one of"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"importance_cap": 0}, "importance_cap must be None or positive"),
        ({"overlong": "cut"}, "overlong must be one of"),
        ({"overlong_buffer": 257}, "overlong_buffer must be in"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"on_collapse": "cry"}, "on_collapse must be one of"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_config_refuses(config, words):
    with pytest.raises(ValueError, match=words):
        sa.grpo.Config(**({"eos_token_id": 0} | config))


def test_train_refuses_before_the_first_step(plain):
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    config = sa.grpo.Config(eos_token_id=0)
    for prompts, reward, words in [
        ([], count_fives, "no prompts to train on"),
        (["text"], count_fives, "prompt 'text' is text: pass tokenizer="),
        ([{"answer": 3}], count_fives, "prompt {'answer': 3} is neither token ids, nor text"),
        ([3], count_fives, "prompt 3 is neither"),
        ([None], count_fives, "prompt None is neither"),
        ([[1.5]], count_fives, r"prompt \[1.5\] is neither"),
        ([[1], []], count_fives, r"prompt \[\] has no token"),
        ([[1]], lambda: 1.0, "reward must take"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            sa.grpo.train(plain, optimizer, prompts, reward, config)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the optimizer requires a gradient"):
        sa.grpo.train(plain, optimizer, [[1]], count_fives, config)
    low = copy.deepcopy(plain).requires_grad_(True).bfloat16()
    optimizer = torch.optim.SGD(low.parameters(), lr=1.0)
    with pytest.raises(
        ValueError, match=r"embed.weight, up.weight, up.bias \(and 2 more\) would train in"
    ):
        sa.grpo.train(low, optimizer, [[1]], count_fives, config)


def test_too_many_failed_rewards_name_the_first_prompt(plain):
    before = state(plain)
    words = r"the reward of prompt \[3\], completion \[.*\]: ValueError: nan is not a finite number"
    with pytest.raises(RuntimeError, match=words):
        run(plain, lambda p, c: math.nan if p == [3] else 0.0)
    with pytest.raises(RuntimeError, match="2 of 2 rewards .* None is not a finite number"):
        run(plain, lambda p, c: None)
    assert_same_bits(state(plain), before)


def test_a_gradient_that_is_not_finite_is_not_applied(plain):
    plain.head.weight.register_hook(lambda g: g * math.nan)
    before = state(plain)
    with pytest.raises(FloatingPointError, match="step 0: the gradient norm is nan"):
        run(plain)
    assert_same_bits(state(plain), before)
    assert all(p.grad is None for p in plain.parameters())


# -- evaluation ------------------------------------------------------------------------------------


def test_evaluate(plain):
    config = sa.grpo.Config(eos_token_id=EOS, max_new_tokens=4)
    plain.train()
    prompts = PROMPTS * 50

    def reward(prompt, completion):
        return float(5 in completion)

    results = [sa.grpo.evaluate(plain, prompts, reward, config, seed=s) for s in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert results[0].count == 250 and results[0].low < results[0].mean < results[0].high
    assert plain.training
    with torch.no_grad():
        plain.head.bias[5] = 100.0
    assert sa.grpo.evaluate(plain, prompts, reward, config, greedy=True).mean == 1.0
    plain.modes.clear()
    plain.train()
    with_context = []

    @contextlib.contextmanager
    def context():
        with_context.append(1)
        yield

    small = {"batch_size": 64, "rollout_context": context}
    parts = sa.grpo.evaluate(plain, prompts, lambda p, c: len(c), config, **small)
    assert with_context == [1] and set(plain.modes) == {(False, False)}
    assert parts.count == 250 and parts.mean == 4.0 == parts.low == parts.high
    plain.head.bias.data[5] = 0.5
    half = sa.grpo.evaluate(plain, prompts, lambda p, c: c.count(5) - 1.0, config, **small)
    spread = half.high - half.low
    assert half.mean < 0 < spread < 1
    with pytest.raises(ValueError, match="no prompts to evaluate on"):
        sa.grpo.evaluate(plain, [], reward, config)


def test_wilson_interval():
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
