"""Merges that say what they lose, and give the base back bit for bit."""

import math
import warnings

import pytest
import torch
from torch import nn

import structadapt as sa


def adapted(dtype, size, adapter=None, seed=0):
    """One layer whose update has a given size relative to its weight."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(256, 256, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(0.02 * torch.randn(256, 256, generator=generator))
    model = sa.adapt(nn.Sequential(layer), adapter or sa.LoRA(rank=8), "0")
    with torch.no_grad():
        if isinstance(layer.adapter, sa.DoRA):
            layer.m.mul_(1 + size)
        else:
            layer.B.normal_(generator=generator)
            layer.B.mul_(size * layer.weight.float().norm() / layer.delta_weight().norm())
    return model


@pytest.mark.parametrize("size, kept", [(1e-4, 0.06), (1e-3, 0.53), (1e-2, 1.0)])
def test_the_share_of_an_update_that_bf16_keeps(size, kept):
    model = adapted(torch.bfloat16, size)
    report = sa.merge(model, report=True, force=True)
    (row,) = report.layers
    assert row.name == "0" and row.dtype == torch.bfloat16
    assert math.isclose(row.relative_update, size, rel_tol=0.01)
    assert abs(row.survives - kept) < 0.05 and report.survives == row.survives
    assert "survives" in str(report) and f"{row.survives:.1%}" in str(report)
    # by hand, from what the layer holds
    W, update = model[0].base_weight.double(), model[0].delta_weight().double()
    by_hand = ((model[0].weight.double() - W) * update).sum() / update.square().sum()
    assert math.isclose(row.survives, by_hand, rel_tol=1e-3)


@pytest.mark.parametrize("kind", [sa.LoRA, sa.DoRA])
def test_a_report_changes_no_weight(kind):
    model = adapted(torch.float32, 1e-3, kind(rank=2))
    with sa.merged(model):
        expected = model[0].weight.clone()
    sa.merge(model, report=True)
    assert torch.equal(model[0].weight, expected)


def test_a_small_magnitude_change_is_lost_altogether_in_bf16():
    model = adapted(torch.bfloat16, 1e-3, sa.DoRA(rank=2))
    assert sa.merge(model, report=True, force=True).survives == 0
    assert torch.equal(model[0].weight, model[0].base_weight)


def test_fp32_keeps_updates_and_says_so():
    for size in (1e-6, 1e-3):
        model = adapted(torch.float32, size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sa.merge(model, report=True).survives > 0.99
    model = adapted(torch.float32, 1e-9)
    with pytest.raises(ValueError, match="survives rounding to torch.float32"):
        sa.merge(model, report=True)


@pytest.mark.parametrize("merge", [sa.merge, lambda model: sa.merged(model).__enter__()])
def test_it_warns_below_99_percent_and_refuses_below_50(merge):
    with pytest.warns(UserWarning, match=r"0: 5\d% of its update of relative size 1.0e-03 surv"):
        merge(adapted(torch.bfloat16, 1e-3))
    model = adapted(torch.bfloat16, 1e-4)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"0: \d% of its update .*; nothing was merged: run it un"):
        merge(model)
    assert torch.equal(model[0].weight, before) and model[0].base_weight is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [sa.LoRA, sa.DoRA, sa.QuanTA])
def test_no_update_is_no_loss(kind, dtype):
    model = sa.adapt(nn.Sequential(nn.Linear(64, 64, dtype=dtype)), kind())
    assert sa.merge(model, report=True).survives == 1


def test_fp32_is_watched_without_a_report_too():
    model = adapted(torch.float32, 1e-8)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="% of its update of relative size 1.0e-08 survives"):
        sa.merge(model)
    assert torch.equal(model[0].weight, before)
    with sa.merged(model, residual=True):
        pass


@pytest.mark.parametrize("dtype, size", [(torch.float16, 1e-5), (torch.float32, 1e-8)], ids=str)
def test_a_residual_is_measured_with_the_weight(dtype, size):
    model = adapted(dtype, size)
    update = model[0].delta_weight().double()
    lost = sa.merge(model, report=True, force=True).survives
    sa.unmerge(model)
    kept = sa.merge(model, report=True, residual=True, force=True).survives
    assert lost < 0.5 < kept
    held = model[0].weight.double() - model[0].base_weight.double() + model[0].residual.double()
    by_hand = (held * update).sum() / update.square().sum()
    assert math.isclose(kept, by_hand, rel_tol=1e-3)


def test_a_residual_that_its_dtype_cannot_hold_is_refused():
    model = adapted(torch.float16, 1e-7)
    with pytest.raises(ValueError, match="0: 0% of its update .*run it unmerged, or pass force=T"):
        sa.merge(model, residual=True)


@pytest.mark.parametrize("merge", [sa.merge, lambda model: sa.merged(model).__enter__()])
def test_the_warning_points_at_who_merges(merge):
    with pytest.warns(UserWarning, match="survives rounding") as said:
        merge(adapted(torch.bfloat16, 1e-3))
    assert [w.filename for w in said] == [__file__]


def test_the_meta_device_has_nothing_to_merge():
    model = sa.adapt(nn.Sequential(nn.Linear(4, 4, device="meta")), sa.LoRA(rank=2))
    with pytest.raises(RuntimeError, match="0 is on the meta device: load the base weights first"):
        sa.merge(model)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_taken_while_merged_is_not_loaded_into_an_adapted_model(net, strict):
    """The update would count twice."""
    sa.adapt(net, sa.LoRA(rank=2))
    with sa.merged(net):
        state = net.state_dict()
    with pytest.raises(RuntimeError, match="blocks.0.attn: this state dict was taken .*twice"):
        net.load_state_dict(state, strict=strict)
    assert net.load_state_dict(net.state_dict())


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_a_kept_residual_loses_next_to_nothing(kind):
    torch.manual_seed(0)
    layer, x = {
        "linear": (nn.Linear(64, 64), torch.randn(8, 64)),
        "embedding": (nn.Embedding(64, 64), torch.arange(64)),
        "conv": (nn.Conv2d(16, 64, 2), torch.randn(2, 16, 5, 5)),
    }[kind]
    x = x if kind == "embedding" else x.bfloat16()
    model = sa.adapt(nn.Sequential(layer.bfloat16()), sa.LoRA(rank=8), "0")
    with torch.no_grad():
        layer.B.normal_()
        layer.B.mul_(1e-3 * layer.weight.float().norm() / layer.delta_weight().norm())
    wanted = layer.adapted_weight()
    with sa.merged(model, force=True):
        lost = (layer.weight.float() - wanted).norm()
    before = layer.weight.clone()
    with sa.merged(model, residual=True):
        kept = layer.weight.float() + layer.residual.float()
        assert (kept - wanted).norm() < lost / 100
        expected = layer.run(x, layer.weight, layer.bias) + layer.run(x, layer.residual, None)
        assert torch.equal(model(x), expected)
    assert torch.equal(layer.weight, before) and layer.residual is None


@pytest.mark.parametrize("kind", [sa.LoRA, sa.DoRA, sa.QuanTA])
def test_a_thousand_merges_of_fresh_updates_leave_a_bf16_base_alone(net, ids, kind):
    sa.adapt(net.bfloat16(), kind())
    base = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    with sa.disabled(net):
        expected = net(ids)
    generator = torch.Generator().manual_seed(0)
    for i in range(1000):
        with torch.no_grad():
            for p in sa.adapter_parameters(net):
                p.add_(10.0 ** -(2 + i % 4) * torch.randn(p.shape, generator=generator))
        sa.merge(net, force=True)
        sa.unmerge(net)
    assert all(torch.equal(p, base[n]) for n, p in net.named_parameters() if n in base)
    with sa.disabled(net):
        assert torch.equal(net(ids), expected)


@pytest.mark.parametrize(
    ("dtype", "size", "taken"),
    [
        (torch.float32, 1e-4, True),
        (torch.bfloat16, 1e-4, False),
        (torch.bfloat16, 1e-3, False),
        (torch.bfloat16, 3e-2, True),
    ],
)
def test_rollouts_are_merged_where_nothing_is_lost(dtype, size, taken):
    model = adapted(dtype, size)
    W = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sa.merged_if_exact(model):
            assert (model[0].base_weight is not None) == taken
            assert torch.equal(model[0].weight, W) != taken
    assert torch.equal(model[0].weight, W) and model[0].base_weight is None
    with pytest.raises(KeyError), sa.merged_if_exact(model):
        raise KeyError
    assert torch.equal(model[0].weight, W) and model[0].base_weight is None


def test_rollouts_of_what_cannot_be_merged_run_as_they_are():
    model = adapted(torch.float32, 1e-2)
    with sa.merged(model), sa.merged_if_exact(model):
        assert model[0].base_weight is not None
    assert model[0].base_weight is None
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    sa.adapt(tied, sa.LoRA(rank=2), "0")
    with sa.merged_if_exact(tied):
        assert tied[0].base_weight is None
