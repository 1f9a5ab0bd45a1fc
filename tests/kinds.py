"""A layer of every kind, for the tests of what they share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import structadapt as sa

KINDS = {  # a layer of every kind, and the shape of an input for it
    "linear": (lambda: nn.Linear(48, 96), (2, 3, 48)),
    "Conv1D": (lambda: Conv1D(96, 48), (2, 3, 48)),
    "embedding": (lambda: nn.Embedding(48, 96), None),
    "conv2d": (lambda: nn.Conv2d(12, 96, 2), (2, 12, 5, 4)),
}
FEW = (sa.LoRA(rank=3), sa.DoRA(rank=3), sa.QuanTA(), sa.QuanTA(init="paper"))
few = pytest.mark.parametrize("few", FEW, ids=repr)
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_and_input(kind):
    torch.manual_seed(0)
    layer, shape = KINDS[kind]
    inputs = torch.randint(0, 48, (2, 3)) if shape is None else torch.randn(shape)
    return layer(), inputs


def defined(layer, x, p=None):
    """A linear layer's output by the definition of the adapted weight."""
    p = layer.tensors() if p is None else p
    return F.linear(x, layer.adapter.weight(layer.weight, p), layer.bias)
