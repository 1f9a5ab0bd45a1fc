"""The GRPO objective against the papers' formulas, written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structadapt as sa
from structadapt.grpo import objective

REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0.7, 0.7, 0.7, 0.7]])


def test_advantages_of_each_scaling():
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    for scaling, divisor in [
        ("none", torch.ones(2, 1)),
        ("group", REWARDS[:2].std(1, keepdim=True) + 1e-4),
        ("batch", REWARDS.std() + 1e-4),
    ]:
        A = sa.grpo.advantages(REWARDS, scaling)
        torch.testing.assert_close(A[:2], centred / divisor)
        assert torch.equal(A[2:], torch.zeros(2, 4))


@given(
    value=st.floats(-1e4, 1e4),
    group=st.integers(1, 9),
    scaling=st.sampled_from(["none", "group", "batch"]),
)
def test_equal_rewards_and_groups_of_one_have_no_advantage(value, group, scaling):
    rewards = torch.full((3, group), value, dtype=torch.float32)
    rewards[1, -1] = rewards[1, -1] * (1 + 1e-7)  # equal up to rounding
    assert torch.equal(sa.grpo.advantages(rewards, scaling), torch.zeros(3, group))
    assert objective.equal_groups(rewards).all()


def test_advantages_refuse():
    with pytest.raises(ValueError, match=r"must be \(prompts, group\), got shape \(4,\)"):
        sa.grpo.advantages(torch.ones(4))
    with pytest.raises(
        ValueError, match="scaling must be one of group, batch, none, rloo, got 'z'"
    ):
        sa.grpo.advantages(REWARDS, "z")
    with pytest.raises(ValueError, match="must be finite"):
        sa.grpo.advantages(torch.tensor([[1.0, math.nan]]))


@pytest.fixture
def batch():
    """Ragged sequences off policy: (logp, old_logp, A, mask), one of them without a token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 3, 7, 0, 2])
    mask = (torch.arange(7) < lengths[:, None]).long()
    old = -torch.rand(6, 7, generator=generator, dtype=torch.float64)
    logp = old + 0.6 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    A = torch.randn(6, generator=generator, dtype=torch.float64)
    return logp.requires_grad_(), old, A, mask


def by_hand(kind, logp, old, A, mask, low, high, max_tokens):
    """Token by token, as in the papers."""
    logp, old, A = logp.tolist(), old.tolist(), A.tolist()
    total, tokens = 0.0, int(mask.sum())
    for i in range(len(A)):
        length = int(mask[i].sum())
        for t in range(length):
            difference = logp[i][t] - old[i][t]
            if kind == "gspo":
                difference = sum(logp[i][u] - old[i][u] for u in range(length)) / length
            rho = math.exp(difference)
            bounded = min(max(rho, 1 - low), 1 + high)
            surrogate = bounded * A[i] * logp[i][t] if kind == "cispo" else min(
                rho * A[i], bounded * A[i])  # fmt: skip
            weight = {
                "grpo": 1 / (length * len(A)),
                "gspo": 1 / (length * len(A)),
                "dapo": 1 / tokens,
                "cispo": 1 / tokens,
                "dr_grpo": 1 / (len(A) * max_tokens),
            }[kind]
            total -= weight * surrogate
    return total


@pytest.mark.parametrize("kind", objective.LOSSES)
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.0, 1e9)])
def test_loss_by_hand(batch, kind, low, high):
    actual = sa.grpo.loss(*batch, kind=kind, clip_low=low, clip_high=high, max_tokens=9)
    assert actual.item() == pytest.approx(by_hand(kind, *batch, low, high, 9))


def test_weights_multiply_each_token(batch):
    logp, old, _, mask = batch
    weights = torch.rand(6, 7, dtype=torch.float64)
    for kind in objective.LOSSES:
        (gradient,) = torch.autograd.grad(sa.grpo.loss(*batch, kind=kind), logp)
        loss = sa.grpo.loss(*batch, kind=kind, weights=weights)
        (weighted,) = torch.autograd.grad(loss, logp)
        if kind != "gspo":  # whose ratio has the gradient of every token
            torch.testing.assert_close(weighted, weights * gradient)
    found = sa.grpo.truncated_weights(logp.detach(), old, mask, cap=1.3)
    expected = (logp.detach() - old).exp().clamp(max=1.3)
    torch.testing.assert_close(found, torch.where(mask.bool(), expected, 1.0))
    assert (found == 1.3).any()


def test_cispo_keeps_the_gradient_of_every_token(batch):
    logp, old, A, mask = batch
    (gradient,) = torch.autograd.grad(sa.grpo.loss(*batch, kind="cispo"), logp)
    rho = (logp - old).exp().detach().clamp(0.8, 1.2)
    torch.testing.assert_close(gradient, -rho * A[:, None] * mask / mask.sum())
    touched = objective.clipped(*batch, "cispo")
    assert touched.any() and gradient[touched].all()


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    A = sa.grpo.advantages(REWARDS, "rloo")
    others = torch.tensor([[(row.sum() - r) / 3 for r in row] for row in REWARDS])
    torch.testing.assert_close(A, REWARDS - others)
    assert not A[2:].any()


def test_a_long_completion_loses_up_to_one():
    found = sa.grpo.overlong_penalty(torch.tensor([1, 6, 7, 8, 9, 10]), 10, 4)
    assert found.tolist() == [0, 0, -0.25, -0.5, -0.75, -1]
    for buffer in (0, 11):
        with pytest.raises(ValueError, match=r"buffer must be in \[1, max_tokens = 10\], got"):
            sa.grpo.overlong_penalty(torch.tensor([1]), 10, buffer)


@pytest.mark.parametrize("estimator", objective.KLS)
def test_kl_and_the_gradient_of_its_estimators(estimator):
    """Over all tokens, weighed by their probabilities: what sampling has in expectation."""
    g = torch.Generator().manual_seed(0)
    z, ref = torch.randn(2, 1, 20, generator=g, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    z.requires_grad_()
    logp, ones = z.log_softmax(-1), torch.ones(1, 20)
    p = logp.exp()
    exact = (p * (logp - ref)).sum()
    (gradient,) = torch.autograd.grad(exact, z, retain_graph=True)
    seen = sa.grpo.kl(logp, ref, estimator)
    if estimator != "k2":
        torch.testing.assert_close((p * seen).sum(), exact)

    def expected_gradient(unbiased):
        weighed = 0.0
        for t in range(20):
            one = torch.nn.functional.one_hot(torch.tensor([t]), 20) * ones
            penalty = sa.grpo.kl_penalty(
                logp, logp.detach(), ref, one, "dapo", estimator, 1.0, unbiased=unbiased
            )
            weighed = weighed + p[0, t].detach() * penalty
        return torch.autograd.grad(weighed, z, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient(True), gradient)
    if estimator == "k2":
        torch.testing.assert_close(expected_gradient(False), gradient)
    if estimator == "k1":
        torch.testing.assert_close(expected_gradient(False), torch.zeros_like(z))
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3, got 'k4'"):
        sa.grpo.kl(logp, ref, "k4")


@pytest.mark.parametrize("kind", objective.LOSSES)
def test_losses_of_micro_batches_add_up(batch, kind):
    logp, _, _, mask = batch
    divisor = sa.grpo.normalizer(mask, kind, 9)
    (whole,) = torch.autograd.grad(sa.grpo.loss(*batch, kind=kind, max_tokens=9), logp)
    for size in (1, 2, 4, 5):
        parts = [
            sa.grpo.loss(*(t[i : i + size] for t in batch), kind=kind, divisor=divisor)
            for i in range(0, 6, size)
        ]
        (summed,) = torch.autograd.grad(sum(parts), logp)
        torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", objective.LOSSES)
def test_tokens_after_the_end_never_matter(batch, kind):
    logp, old, A, mask = batch
    expected = sa.grpo.loss(*batch, kind=kind)
    (gradient,) = torch.autograd.grad(expected, logp)
    assert not gradient[mask == 0].any()
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        dirty = logp.detach().masked_fill(mask == 0, poison).requires_grad_()
        loss = sa.grpo.loss(dirty, old, A, mask, kind=kind)
        (other,) = torch.autograd.grad(loss, dirty)
        assert loss == expected and torch.equal(other, gradient)


def test_on_policy_the_gradient_is_that_of_reinforce(batch):
    logp, _, A, mask = batch
    (gradient,) = torch.autograd.grad(sa.grpo.loss(logp, logp.detach(), A, mask), logp)
    torch.testing.assert_close(gradient, -A[:, None] * mask / mask.sum())


def test_clipped_tokens_get_no_gradient(batch):
    logp, _, _, mask = batch
    (gradient,) = torch.autograd.grad(sa.grpo.loss(*batch), logp)
    clipped = objective.clipped(*batch)
    assert torch.equal(clipped, (gradient == 0) & (mask == 1)) and clipped.any()


def test_advantages_come_as_they_are_or_flat(batch):
    logp, old, A, mask = batch
    expected = sa.grpo.loss(*batch)
    assert sa.grpo.loss(logp, old, A.view(2, 3), mask) == expected
    for wrong in (A[:5], A.repeat(2), A[0]):
        with pytest.raises(ValueError, match="advantages must be one for each of 6 sequences"):
            sa.grpo.loss(logp, old, wrong, mask)
    with pytest.raises(ValueError, match=r"logp \(6, 7\), old_logp \(6, 5\)"):
        sa.grpo.loss(logp, old[:, :5], A, mask)
    for wrong in (old[:, :1], old[0], old[:1]):  # which would be repeated
        for call in (
            lambda wrong=wrong: sa.grpo.kl_penalty(logp, old, wrong, mask),
            lambda wrong=wrong: sa.grpo.kl(logp, wrong),
            lambda wrong=wrong: sa.grpo.truncated_weights(old, wrong, mask),
        ):
            with pytest.raises(ValueError, match=r"shapes must be the same \(N, T\), got "):
                call()
    with pytest.raises(ValueError, match="loss must be one of"):
        sa.grpo.loss(*batch, kind="ppo", divisor=1.0)


def test_an_enormous_ratio_stays_finite():
    one = torch.ones(1, 1)
    assert objective.ratio(300 * one, 0 * one, one).item() == pytest.approx(math.exp(20))
    assert objective.ratio(-one, 0.5 * one, one).item() == pytest.approx(math.exp(-1.5))
    logp = torch.tensor([[0.0, -300.0]], requires_grad=True)
    old = torch.tensor([[-300.0, 0.0]])
    for A in (1.0, -1.0):
        loss = sa.grpo.loss(logp, old, torch.tensor([A]), torch.ones(1, 2))
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


def test_no_token_at_all():
    logp = torch.zeros(2, 3, requires_grad=True)
    for kind in objective.LOSSES:
        loss = sa.grpo.loss(logp, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), kind=kind)
        assert loss.item() == 0.0
    with pytest.raises(
        ValueError, match="loss must be one of grpo, dr_grpo, dapo, cispo, gspo, got"
    ):
        sa.grpo.loss(logp, logp, torch.ones(2), torch.ones(2, 3), kind="ppo")


def test_kl_estimate_is_unbiased_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    drawn = torch.multinomial(old.exp(), 200_000, replacement=True, generator=generator)
    estimates = objective.kl_from_old(new[drawn], old[drawn])
    exact = (old.exp() * (old - new)).sum()
    assert (estimates >= 0).all()
    assert estimates.mean().item() == pytest.approx(exact.item(), rel=0.03)
