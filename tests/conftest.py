import os

# Before anything imports triton: kernels then run on CPU tensors, in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads would wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from every_adapter import ADAPTERS
from hypothesis import settings
from torch import nn

import structadapt as sa

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")


def pytest_generate_tests(metafunc):
    if "adapter" in metafunc.fixturenames:
        metafunc.parametrize("adapter", ADAPTERS, ids=repr)


def pytest_collection_modifyitems(items):
    """Two workers (-n 2 --dist worksteal) begin with a half of the tests each and then take from
    the end of each other's: slow ones go to the front of both halves, so that quick ones are left
    to come out even with. Those of a file stay together, for the fixtures that they share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    files = [*dict.fromkeys(item.path for item in slow)]
    first = [item for item in slow if item.path in files[::2]]
    second = [item for item in slow if item.path in files[1::2]]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    cut = max(len(items) // 2 - len(first), 0)
    items[:] = [*first, *quick[:cut], *second, *quick[cut:]]


class Net(nn.Module):
    """Two blocks and a head, square and rectangular layers, with and without bias."""

    def __init__(self, width: int = 32, vocab: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": nn.Linear(width, width),
                    "up": nn.Linear(width, 2 * width, bias=False),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["attn"](x).cumsum(1) / 8
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.lm_head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def train_a_little():
    """Move the adapters of a model away from where they started."""

    def move(model, scale=0.05, seed=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in sa.adapter_parameters(model):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))
        return model

    return move


@pytest.fixture
def ids():
    return torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def perturb():
    """The same tensors after some imaginary training; frozen ones stay."""

    def moved(p, scale=0.3, seed=1):
        generator = torch.Generator().manual_seed(seed)
        noise = {k: torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in p.items()}
        return {k: t if k.startswith("frozen_") else t + scale * noise[k] for k, t in p.items()}

    return moved


@pytest.fixture
def x():
    """Six tokens of width 48 in each of four sequences."""
    return torch.randn(4, 6, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
