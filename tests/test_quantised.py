"""Adapters over quantised linear layers: torchao and bitsandbytes on the CPU, and the hook."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structadapt as sa
from structadapt.interop import export_merged
from structadapt.layers import find_adapted


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype)


@pytest.fixture(params=["torchao int8", "bitsandbytes nf4", "bitsandbytes int8", "a hook"])
def quantised(request):
    """(a quantised model, the hook to pass)"""
    if request.param == "torchao int8":
        logging.disable(logging.WARNING)  # it looks for CUDA libraries while being imported
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        logging.disable(logging.NOTSET)
        model = plain()
        quantize_(model, Int8WeightOnlyConfig())
        return model, None
    if request.param == "a hook":
        model = plain()
        for i in (0, 2):
            model[i] = Halved(model[i])
        return model, halved_weight
    import bitsandbytes as bnb

    model = plain()
    for i in (0, 2):
        old = model[i]
        if request.param == "bitsandbytes nf4":
            new = bnb.nn.Linear4bit(
                64, old.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
        else:
            new = bnb.nn.Linear8bitLt(64, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        model[i] = new.to("cpu")
    return model, None


class Halved(nn.Linear):
    """A layer of somebody else's, with its own forward and an integer weight."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        self.weight = nn.Parameter((layer.weight.detach() * 100).to(torch.int8), False)

    def forward(self, input):
        return F.linear(input, self.weight.float() / 100, self.bias)


def halved_weight(layer):
    return layer.weight.float() / 100


def test_laws_over_a_quantised_base(quantised, adapter, tmp_path, train_a_little):
    if isinstance(adapter, sa.QuanTA) and adapter.axes > 3:
        adapter = sa.QuanTA(3)
    model, hook = quantised
    x = torch.randn(5, 64)
    base = copy.deepcopy(model)
    expected = model(x)
    plan = sa.plan(model, adapter, dequantize=hook)
    sa.adapt(model, adapter, dequantize=hook)
    assert sa.summary(model) == plan
    assert torch.equal(model(x), expected), "the start is the quantised model, bit for bit"
    train_a_little(model)
    layer = model[0]
    W = layer.matrix()
    assert W.shape == (64, 64) and W.is_floating_point()
    dense = F.linear(x, layer.adapter.weight(W, layer.tensors()), layer.bias)
    tolerance = 0.05 if "8bit" in type(layer).__name__ else 1e-4  # that one rounds x to int8 too
    torch.testing.assert_close(layer(x), dense, rtol=tolerance, atol=tolerance)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sa.adapter_parameters(model))
    assert not torch.equal(y, expected)
    with sa.disabled(model):
        assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="0 has a quantised weight"):
        sa.merge(model)
    with pytest.raises(ValueError, match="0 is quantised: load the adapter"):
        export_merged(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    sa.save(model, tmp_path / "a")
    if hook is None:
        assert torch.equal(sa.load(base, tmp_path / "a")(x), y)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y) and list(find_adapted(twin)) == ["0", "2"]


def test_without_the_hook_a_foreign_layer_is_refused():
    model = nn.Sequential(Halved(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="a Halved: only nn.Linear"):
        sa.adapt(model, sa.LoRA(), "0")


def test_bitsandbytes_before_it_is_quantised_is_refused():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(8, 8))
    with pytest.raises(ValueError, match="is not quantised yet"):
        sa.adapt(model, sa.LoRA(), "0")
