"""What the loop can be told: which groups it learns from, what holds it back, when it stops."""

import contextlib
import copy
import itertools
import logging
import math
import random

import pytest
import safetensors.torch
import torch
from test_grpo_train import EOS, PROMPTS, Plain, assert_same_bits, count_fives, noise, run, state

import structadapt as sa
from structadapt.grpo import objective
from structadapt.grpo.rollout import generate, logprobs


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain()


def sampled(model, prompts=PROMPTS):
    repeated = [p for p in prompts for _ in range(4)]
    return generate(
        model, repeated, eos_token_ids=[EOS], max_new_tokens=6, noise=noise(len(prompts), 6)
    )


# -- which groups, and what of them ----------------------------------------------------------------


def only_some(prompt, completion):
    """Equal in every group but those of [3] and [7]."""
    return completion.count(5) / 6 + 0.01 * len(completion) if prompt in ([3], [7]) else 0.0


def test_groups_with_equal_rewards_are_replaced_by_those_of_the_next_prompts(plain):
    prompts = [[1, 2], [3], [4, 5, 6], [2, 2], [7], [7], [3], [1]]
    twin = copy.deepcopy(plain)
    steps = run(plain, only_some, prompts, prompts_per_step=2, max_resamples=3)
    assert [s.prompts for s in steps] == [5, 7, 8]
    assert [s.resampled for s in steps] == [3, 0, 0]
    assert [s.zero_std_fraction for s in steps] == [0.0, 0.0, 1.0]
    # the first step by hand: prompts 1 and 4, at the step's noise
    rollout = sampled(twin, prompts[:5])
    rows = torch.tensor([4, 5, 6, 7, 16, 17, 18, 19])
    texts = [rollout.completions([EOS])[i] for i in rows.tolist()]
    rewards = torch.tensor([only_some([3], c) for c in texts], dtype=torch.float64).view(2, 4)
    assert steps[0].reward == pytest.approx(rewards.mean().item())
    few = run(copy.deepcopy(twin), only_some, prompts, prompts_per_step=2, max_resamples=1)
    assert few[0].zero_std_fraction == 0.5, "what is missing is filled up"
    assert few[0].prompts == 3 and few[0].resampled == 1


def test_truncated_completions_can_teach_nothing(plain):
    twin = copy.deepcopy(plain)
    (step,) = run(plain, overlong="mask", max_grad_norm=math.inf)
    rollout = sampled(twin.eval())
    assert 0 < step.truncated == rollout.truncated.double().mean().item() < 1
    rewards = torch.tensor([c.count(5) / 6 for c in rollout.completions([EOS])]).view(5, 4)
    mask = rollout.mask * (~rollout.truncated).long()[:, None]
    logp, _ = logprobs(twin, rollout)
    sa.grpo.loss(logp, logp.detach(), sa.grpo.advantages(rewards), mask).backward()
    for actual, start in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, start - start.grad, rtol=1e-4, atol=1e-6)


def test_long_completions_lose_reward_in_the_update_alone(plain):
    twin = copy.deepcopy(plain)
    (step,) = run(plain, overlong_buffer=3, advantage="none", max_grad_norm=math.inf)
    rollout = sampled(twin.eval())
    rewards = torch.tensor([c.count(5) / 6 for c in rollout.completions([EOS])]).view(5, 4)
    assert step.reward == pytest.approx(rewards.mean().item())
    lost = sa.grpo.overlong_penalty(rollout.mask.sum(1), 6, 3).view(5, 4)
    A = sa.grpo.advantages(rewards.double() + lost, "none")
    logp, _ = logprobs(twin, rollout)
    sa.grpo.loss(logp, logp.detach(), A.float(), rollout.mask).backward()
    for actual, start in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, start - start.grad, rtol=1e-4, atol=1e-6)


# -- the reference and the sampler -----------------------------------------------------------------


@contextlib.contextmanager
def shifted(model, by):
    model.head.bias.data[5] += by
    yield
    model.head.bias.data[5] -= by


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kind", objective.KLS)
def test_the_kl_penalty_by_hand(plain, kind, unbiased):
    twin = copy.deepcopy(plain)
    (step,) = run(
        plain, kl_coef=0.5, kl=kind, kl_unbiased=unbiased, max_grad_norm=math.inf,
        options={"reference": lambda: shifted(plain, 1.0)}, micro_batch_size=7,
    )  # fmt: skip
    rollout = sampled(twin.eval())
    rewards = torch.tensor([c.count(5) / 6 for c in rollout.completions([EOS])]).view(5, 4)
    with torch.no_grad(), shifted(twin, 1.0):
        ref = logprobs(twin, rollout)[0]
    logp, _ = logprobs(twin, rollout)
    policy = (logp, logp.detach(), sa.grpo.advantages(rewards), rollout.mask)
    penalty = sa.grpo.kl_penalty(
        logp, logp.detach(), ref, rollout.mask, estimator=kind, unbiased=unbiased
    )
    (sa.grpo.loss(*policy) + 0.5 * penalty).backward()
    for actual, start in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, start - start.grad, rtol=1e-4, atol=1e-6)
    on = rollout.mask.bool()
    assert step.reference_kl == pytest.approx(sa.grpo.kl(logp, ref)[on].mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="kl_coef is 0.5, which needs a reference policy"):
        run(plain, kl_coef=0.5)


def test_with_a_penalty_equal_rewards_still_move_the_policy(plain):
    before = state(plain)
    (step,) = run(plain, lambda p, c: 1.0, kl_coef=0.5,
                  options={"reference": lambda: shifted(plain, 1.0)})  # fmt: skip
    assert step.updates == 1 and not torch.equal(plain.head.bias, before["head.bias"])


def test_importance_weights_for_a_sampler_that_differs(plain):
    twin = copy.deepcopy(plain)
    options = {"rollout_context": lambda: shifted(plain, 0.7)}
    (step,) = run(plain, importance_cap=1.14, max_grad_norm=math.inf, options=options, epochs=1)
    with shifted(twin, 0.7):
        rollout = sampled(twin.eval())
    rewards = torch.tensor([c.count(5) / 6 for c in rollout.completions([EOS])]).view(5, 4)
    logp, _ = logprobs(twin, rollout)
    weights = sa.grpo.truncated_weights(logp.detach(), rollout.logp, rollout.mask, 1.14)
    on = rollout.mask.bool()
    assert (weights[on] == torch.tensor(1.14)).any() and (weights[on] < 1).any()
    A = sa.grpo.advantages(rewards)
    sa.grpo.loss(logp, logp.detach(), A, rollout.mask, weights=weights).backward()
    for actual, start in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, start - start.grad, rtol=1e-4, atol=1e-6)
    gap = (logp - rollout.logp)[on]
    assert step.mismatch == pytest.approx(gap.abs().max().item(), rel=1e-4)
    off = (gap.exp() - 1 - gap).mean().item()
    assert step.mismatch_kl == pytest.approx(off, rel=1e-4) and off > 0


def test_the_mismatch_is_measured_when_nothing_is_learned(plain):
    options = {"rollout_context": lambda: shifted(plain, 0.7)}
    (step,) = run(plain, lambda p, c: 0.0, options=options)
    assert step.updates == 0 and step.mismatch > 0.1 and step.mismatch_kl > 0


def test_several_passes_over_a_rollout(plain):
    optimizer = torch.optim.SGD(plain.parameters(), lr=20.0)
    (once,) = run(copy.deepcopy(plain), minibatches=2)
    (step,) = run(plain, optimizer=optimizer, minibatches=2, epochs=3)
    assert step.updates == 3 * once.updates == 6
    assert step.clip_fraction > 0, "later passes are off policy"


# -- what ends a run -------------------------------------------------------------------------------


class BreaksAt:
    """NaN in the gradient of `head` at some backward passes."""

    def __init__(self, model, *calls):
        self.calls, self.count = calls, itertools.count()
        model.head.weight.register_hook(self)

    def __call__(self, gradient):
        return gradient * math.nan if next(self.count) in self.calls else gradient


def test_a_gradient_that_is_not_finite_is_left_out_or_ends_the_run(plain):
    twin = copy.deepcopy(plain)
    BreaksAt(twin, 1)
    with pytest.raises(FloatingPointError, match=r"step 1: .* not finite in head.weight; stopped"):
        run(twin, prompts=PROMPTS * 3)
    twin = copy.deepcopy(plain)
    BreaksAt(twin, 1)
    steps = run(twin, prompts=PROMPTS * 3, nonfinite="skip")
    assert [s.skipped for s in steps] == [0, 1, 0] and [s.updates for s in steps] == [1, 0, 1]
    assert all(p.isfinite().all() for p in twin.parameters())
    BreaksAt(plain, 1, 2, 3)
    with pytest.raises(FloatingPointError, match="step 3"):
        run(plain, prompts=PROMPTS * 5, nonfinite="skip", max_nonfinite=3)


def test_too_many_left_out_updates_end_the_run_and_the_minibatch_is_kept(plain, tmp_path):
    """More than 1 % of them, once there were 100, far apart as they are."""
    BreaksAt(plain, 3, 99)
    rewards = random.Random(0)
    told = r"step 99: .* not finite in head.weight \(2 of 100 updates\); stopped"
    with pytest.raises(FloatingPointError, match=told):
        run(
            plain, lambda p, c: rewards.random(), [[1, 2]] * 120, nonfinite="skip",
            prompts_per_step=1, options={"checkpoints": sa.grpo.Checkpoints(tmp_path, every=1000)},
        )  # fmt: skip
    (path,) = tmp_path.iterdir()
    kept = safetensors.torch.load_file(path)
    assert path.name == "nonfinite-step-00000099-process-0.safetensors"
    assert kept["prompt"].tolist() == [[1, 2]] * 4
    assert kept["advantages"].std() > 0.5 and kept["completion"].shape == kept["logp"].shape


def test_the_guard_names_what_it_sees(plain):
    guard = sa.grpo.Guard(patience=2)
    dead = run(plain, lambda p, c: 0.0, PROMPTS * 4, options={"guard": guard})
    assert [bool(s.alarms) for s in dead] == [False, True, True, True]
    assert (
        dead[3].alarms[0].startswith("absorbing: the rewards of every group are equal since step 0")
    )
    before = state(plain)
    steps = []
    with pytest.raises(sa.grpo.CollapseError, match="step 1: absorbing"):
        steps.extend(run(plain, lambda p, c: 0.0, PROMPTS * 4, on_collapse="stop",
                         options={"guard": sa.grpo.Guard(patience=2)}))  # fmt: skip
    assert_same_bits(state(plain), before)
    (far,) = run(plain, optimizer=torch.optim.SGD(plain.parameters(), lr=300.0))
    assert far.alarms and far.alarms[0].startswith("kl: the update moved the policy by")
    for limits in ({"patience": 0}, {"max_kl": 0}, {"length_factor": 1}):
        with pytest.raises(ValueError, match="patience must be at least 1, max_kl positive"):
            sa.grpo.Guard(**limits)


def test_the_guard_sees_lengths_explode(plain):
    (step,) = run(plain)
    guard = sa.grpo.Guard(patience=2)
    lengths = [10.0, 12.0, 30.0, 45.0]
    found = [
        guard.look(sa.grpo.Step(**{**vars(step), "length": length, "kl": 0.0}))
        for length in lengths
    ]
    assert [bool(alarms) for alarms in found] == [False, False, False, True]
    assert found[3][0] == "length: 45 tokens a completion, 11 at first"


def test_a_few_failed_rewards_are_counted_and_told(plain, caplog):
    calls = itertools.count()

    def reward(prompt, completion):
        if next(calls) == 3:
            raise KeyError("no such answer")
        return completion.count(5) / 6

    with caplog.at_level(logging.WARNING):
        (step,) = run(plain, reward)
    assert step.reward_faults == 1
    assert "step 0: the reward of prompt [1, 2]" in caplog.text and "no such answer" in caplog.text


# -- evaluation ------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for samples in (1, 4, 6):
        for right in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(itertools.combinations([i < right for i in range(samples)], k))
                expected = sum(map(any, draws)) / len(draws)
                found = sa.grpo.pass_at_k(torch.tensor([right]), samples, k)
                assert found.item() == pytest.approx(expected)
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"k must be in \[1, 4\], got"):
            sa.grpo.pass_at_k(torch.tensor([1]), 4, k)


def test_several_samples_of_each_prompt(plain):
    config = sa.grpo.Config(eos_token_id=EOS, max_new_tokens=4)

    def reward(prompt, completion):
        return float(5 in completion)

    options = {"samples": 8, "k": (1, 2, 8)}
    found = sa.grpo.evaluate(plain, PROMPTS * 10, reward, config, **options)
    assert found.count == 400 and list(found.pass_at) == [1, 2, 8]
    assert found.pass_at[1].mean == pytest.approx(found.mean)
    assert found.pass_at[1].mean < found.pass_at[2].mean < found.pass_at[8].mean
    for interval in (found, *found.pass_at.values()):
        assert interval.low < interval.mean < interval.high
    again = sa.grpo.evaluate(plain, PROMPTS * 10, reward, config, batch_size=24, **options)
    assert again == found, "the same seed gives the same samples, whatever runs beside them"
    for wrong in ({"samples": 0}, {"samples": 2, "k": (3,)}, {"samples": 2, "greedy": True}):
        with pytest.raises(ValueError, match="samples must be at least 1, 1 if greedy"):
            sa.grpo.evaluate(plain, PROMPTS, count_fives, config, **wrong)
