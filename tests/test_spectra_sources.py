"""What a source holds, against what was written into it; and sources that are broken on purpose."""

import copy
import hashlib
import json
import math
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt.spectra.reading import (
    SourceError,
    SourceNotFoundError,
    open_source,
    pickle_file,
)
from structadapt.spectra.reading.differences import ulp_exponents
from structadapt.spectra.reading.matrix import CHUNK, PIECE


def values(matrix):
    """All rows of a matrix, after a look at the slices."""
    slices = list(matrix.rows())
    assert all(s.shape[1] == matrix.shape[1] and s.device.type == "cpu" for s in slices)
    assert all(s.numel() <= max(CHUNK, matrix.shape[1]) for s in slices)
    whole = torch.cat(slices)
    assert tuple(whole.shape) == matrix.shape
    return whole


def by_name(opened, kind=None):
    found = {m.name: m for m in opened.matrices if kind in (None, m.kind)}
    assert len(found) == len([m for m in opened.matrices if kind in (None, m.kind)])
    return found


def reasons(opened):
    return {s.name: s.reason for s in opened.skipped}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shards(folder, tensors, index=None, suffix="safetensors"):
    """Two files and an index, as save_pretrained writes them."""
    folder.mkdir(exist_ok=True)
    names = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        own = {n: t for n, t in tensors.items() if where[n] == file}
        if suffix == "bin":
            torch.save(own, folder / file)
        else:
            safetensors.torch.save_file(own, folder / file)
    name = (
        "model.safetensors.index.json"
        if suffix == "safetensors"
        else "pytorch_model.bin.index.json"
    )
    (folder / name).write_text(json.dumps({"weight_map": where if index is None else index}))
    return names


# -- files of weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_file_gives_what_was_stored_bit_for_bit(tmp_path, dtype):
    W = {"a.q_proj.weight": random(7, 5, dtype=dtype), "b.weight": random(1, 1, dtype=dtype)}
    safetensors.torch.save_file({**W, "a.bias": torch.ones(5)}, tmp_path / "x.safetensors")
    torch.save({**W, "a.bias": torch.ones(5)}, tmp_path / "x.pt")
    torch.save(W, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("x.safetensors", "x.pt", "old.pt"):
        opened = open_source(tmp_path / file)
        found = by_name(opened)
        assert found.keys() == {"a.q_proj", "b"}
        for name, matrix in found.items():
            assert torch.equal(values(matrix), W[f"{name}.weight"])
            assert torch.equal(values(matrix), values(matrix)), "rows can be asked for again"
            assert (matrix.kind, matrix.step, matrix.base) == ("weight", 0.0, None)
            assert matrix.dtype == str(dtype).removeprefix("torch.")
            assert matrix.precision == f"stored {matrix.dtype}"
            assert matrix.source == str(tmp_path / file)
        if file != "old.pt":
            assert reasons(opened) == {"a.bias": "1-D, no matrix"}
        data = (tmp_path / file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert opened.files == [(str(tmp_path / file), len(data), digest)]
    assert any("held in memory" in note for note in opened.notes)


def test_rows_come_in_slices_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("structadapt.spectra.reading.matrix.CHUNK", 30)
    W = random(23, 7)
    safetensors.torch.save_file({"w": W}, tmp_path / "x.safetensors")
    (matrix,) = open_source(tmp_path / "x.safetensors").matrices
    heights = [len(s) for s in matrix.rows()]
    assert heights == [4] * 5 + [3] and torch.equal(torch.cat(list(matrix.rows())), W)
    embedding = nn.Embedding(23, 7)
    (matrix,) = open_source(embedding).matrices
    slices = list(matrix.rows())
    assert len(slices) > 1 and torch.equal(torch.cat(slices), embedding.weight.T)
    other = copy.deepcopy(embedding)
    other.weight.data.mul_(1.5)
    (matrix,) = open_source(other, embedding).matrices
    torch.testing.assert_close(torch.cat(list(matrix.rows())), embedding.weight.T.double() / 2)


def test_shards_of_both_formats_and_the_cache_of_hugging_face(tmp_path):
    W = {f"layers.{i}.weight": random(4 + i, 3, seed=i) for i in range(4)}
    for suffix in ("safetensors", "bin"):
        shards(tmp_path / suffix, W, suffix=suffix)
        opened = open_source(tmp_path / suffix)
        assert opened.what == "2 shards" and len(opened.files) == 3
        for i, matrix in enumerate(opened.matrices):
            assert matrix.name == f"layers.{i}"
            assert torch.equal(values(matrix), W[f"layers.{i}.weight"])
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "safetensors").iterdir():
        os.replace(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert len(open_source(snapshot).matrices) == 4
    assert len(open_source(snapshot / "model.safetensors.index.json").matrices) == 4


def test_the_read_order_of_a_folder(tmp_path):
    tensors = {n: {n: random(3, 2)} for n in ("shards", "model", "adapter", "bin", "other")}
    torch.save(tensors["bin"], tmp_path / "pytorch_model.bin")
    assert by_name(open_source(tmp_path)).keys() == {"bin"}
    safetensors.torch.save_file(tensors["other"], tmp_path / "other.safetensors")
    assert by_name(open_source(tmp_path)).keys() == {"bin"}
    safetensors.torch.save_file(tensors["model"], tmp_path / "model.safetensors")
    opened = open_source(tmp_path)
    assert by_name(opened).keys() == {"model"}
    assert any("also holds pytorch_model.bin, which is not read" in n for n in opened.notes)
    shards(tmp_path, {"s0": random(2, 2), "s1": random(2, 2)})
    assert by_name(open_source(tmp_path)).keys() == {"s0", "s1"}
    assert by_name(open_source(tmp_path / "other.safetensors")).keys() == {"other"}
    single = tmp_path / "single"
    single.mkdir()
    safetensors.torch.save_file(tensors["other"], single / "any.safetensors")
    assert by_name(open_source(single)).keys() == {"other"}
    safetensors.torch.save_file(tensors["other"], single / "more.safetensors")
    with pytest.raises(SourceError, match="2 safetensors files.*any.safetensors, more.safetensors"):
        open_source(single)


def test_a_training_checkpoint_of_torch_save(tmp_path):
    W = random(3, 4)
    state = {"module.a.weight": W, "module.tied.weight": W, 3: W, "step": 7}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pt")
    opened = open_source(tmp_path / "x.pt")
    (matrix,) = opened.matrices
    assert matrix.name == "a" and torch.equal(values(matrix), W)
    assert reasons(opened)["tied"] == "the same storage as a, which is looked at"
    assert "no text" in reasons(opened)["3"] and "no tensor" in reasons(opened)["step"]
    assert any("under 'state_dict'" in note for note in opened.notes)
    for way in ("model", "state_dict"):  # nanoGPT's, and one with the state of a generator
        beside = {"best_val_loss": torch.tensor(3.2), "rng_state": torch.get_rng_state()}
        torch.save({way: state, "iter_num": 5, **beside}, tmp_path / "run.pt")
        (matrix,) = open_source(tmp_path / "run.pt").matrices
        assert matrix.name == "a" and torch.equal(values(matrix), W)
    flat = {"a.weight": W, "model": {"other.weight": W}}  # a matrix at the top: that is the model
    torch.save(flat, tmp_path / "flat.pt")
    opened = open_source(tmp_path / "flat.pt")
    assert by_name(opened).keys() == {"a"} and "a dict, no tensor" in reasons(opened)["model"]
    torch.save(W.T, tmp_path / "bare.pt")  # not contiguous
    assert torch.equal(values(open_source(tmp_path / "bare.pt").matrices[0]), W.T)


def test_every_tensor_that_is_not_looked_at_has_a_reason(tmp_path):
    tensors = {
        "norm.weight": torch.ones(3),
        "scalar": torch.tensor(1.0),
        "ids": torch.ones(2, 2, dtype=torch.int64),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "empty.weight": torch.ones(0, 5),
        "fp8.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "fp8.weight_scale_inv": torch.ones(1, 1),
        "gptq.qweight": torch.ones(2, 2, dtype=torch.int32),
        "gptq.scales": torch.ones(2, 2, dtype=torch.float16),
        "bnb.weight": torch.ones(4, 1, dtype=torch.uint8),
        "bnb.weight.quant_map": torch.ones(4, 4),
        "red\x1b[31m.weight": torch.ones(2, 2),
        "fine.scales": torch.ones(2, 2),
        "conv.weight": random(4, 3, 2, 2),
        "conv1d.weight": random(4, 3, 2, seed=1),
        "mlp.experts.gate_up_proj": random(3, 4, 5, seed=2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    opened = open_source(tmp_path / "x.safetensors")
    found, why = by_name(opened), reasons(opened)
    assert found.keys() == {
        *("fine.scales", "conv", "conv1d"),
        *(f"mlp.experts.gate_up_proj.{i}" for i in range(3)),
    }
    assert torch.equal(values(found["conv"]), tensors["conv.weight"].flatten(1))
    assert torch.equal(values(found["conv1d"]), tensors["conv1d.weight"].flatten(1))
    for i in range(3):
        expert = values(found[f"mlp.experts.gate_up_proj.{i}"])
        assert torch.equal(expert, tensors["mlp.experts.gate_up_proj"][i])
    assert len(found) - 2 + len(why) == len(tensors), "nothing is silently left out"
    for name, part in {
        "norm": "1-D",
        "scalar": "0-D",
        "ids": "int64",
        "mask": "bool",
        "empty": "empty, 0 x 5",
        "fp8": "float8_e4m3fn",
        "fp8.weight_scale_inv": "quantised",
        "gptq.qweight": "int32",
        "gptq.scales": "quantised",
        "bnb": "uint8",
        "bnb.weight.quant_map": "quantised",
        "'red\\x1b[31m.weight'": "control characters",
    }.items():
        assert part in why[name], name


def test_what_is_no_weight_is_no_kernel_and_no_expert(tmp_path):
    tensors = {
        "h.0.attn.bias": torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5),  # the mask of GPT-2
        "h.1.attn.bias": torch.ones(1, 1, 5, 5, dtype=torch.uint8),
        "cls_token": torch.ones(1, 1, 6),
        "gamma": torch.ones(6, 1, 1),
        "position_embeddings": random(1, 5, 6),
        "mlp.experts.down_proj": random(1, 4, 6, seed=1),
        "many": random(2, 4, 6, seed=2),
        "depthwise.weight": random(6, 1, 1, seed=3),
        "old.weight_v": random(4, 3, 2, 2, seed=4),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    opened = open_source(tmp_path / "x.safetensors")
    found, why = by_name(opened), reasons(opened)
    assert found.keys() == {
        *("position_embeddings", "mlp.experts.down_proj.0", "many.0", "many.1", "depthwise"),
        "old.weight_v",
    }
    assert torch.equal(values(found["position_embeddings"]), tensors["position_embeddings"][0])
    assert why.keys() == tensors.keys() & {"h.0.attn.bias", "h.1.attn.bias", "cls_token", "gamma"}
    assert all(reason.startswith("no matrix: ") for reason in why.values())


def test_a_value_that_is_not_finite_spoils_its_matrix_alone(tmp_path):
    bad = random(6, 5)
    bad[2, 3], bad[4, 0], bad[5, 1] = torch.nan, torch.inf, -torch.inf
    safetensors.torch.save_file({"bad": bad, "good": random(2, 2)}, tmp_path / "x.safetensors")
    found = by_name(open_source(tmp_path / "x.safetensors"))
    message = r"x.safetensors: bad is not finite: 1 NaN and 2 infinite of 30 .*first at \[2, 3\]"
    with pytest.raises(SourceError, match=message):
        list(found["bad"].rows())
    assert values(found["good"]).shape == (2, 2)


def test_include_and_exclude(tmp_path):
    names = [f"layers.{i}.{kind}_proj.weight" for i in range(2) for kind in "qk"]
    safetensors.torch.save_file({n: random(2, 2) for n in names}, tmp_path / "x.safetensors")

    def chosen(**settings):
        return [m.name for m in open_source(tmp_path / "x.safetensors", **settings).matrices]

    assert chosen(include="q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert chosen(exclude=[r"\.0\.", "k_"]) == ["layers.1.q_proj"]
    assert (
        "2 matrices were left out"
        in open_source(tmp_path / "x.safetensors", include="q_proj").notes[-1]
    )
    with pytest.raises(
        SourceError, match="include and exclude leave no matrix: there are layers.0"
    ):
        chosen(include="z")
    with pytest.raises(SourceError, match="exclude=.*is no regular expression"):
        chosen(exclude="(")


def test_reading_a_large_matrix_takes_little_memory(tmp_path):
    rows, columns = 25_000, 4_000  # 200 MB in bf16
    path = tmp_path / "x.safetensors"
    header = {
        "w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:  # zeros that take no room on the disk
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * rows * columns)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, most, seen = resident(), 0, 0
    tracemalloc.start()
    (matrix,) = open_source(path).matrices
    for part in matrix.rows():
        seen += part.numel()
        most = max(most, resident() - before)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == rows * columns and traced < 8 * 2**20 and most < 128 * 2**20


# -- two checkpoints -------------------------------------------------------------------------------


def spacing(values):
    """The distance to the next larger number, by numpy; of bf16 by its definition."""
    if values.dtype != torch.bfloat16:
        return np.spacing(values.abs().numpy()).astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(values.double().abs().numpy(), 2.0**-126)))
    return 2.0 ** (exponent - 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_difference_and_its_rounding_step(tmp_path, dtype):
    base = random(9, 6) * torch.logspace(-9, 4, 54).view(9, 6)
    tuned = (base + 1e-2 * random(9, 6, seed=1)).to(dtype)
    base = base.to(dtype)
    tuned[0, 0], base[0, 1], tuned[0, 2] = 0.0, 0.0, 1.0
    safetensors.torch.save_file({"w.weight": base}, tmp_path / "base.safetensors")
    safetensors.torch.save_file({"w.weight": tuned}, tmp_path / "tuned.safetensors")
    squares = np.square(spacing(tuned))
    if dtype in (torch.bfloat16, torch.float16):  # both may have been rounded
        squares = squares + np.square(spacing(base))
    expected = np.sqrt(np.mean(squares))
    for streamed_first in (True, False):
        opened = open_source(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
        (matrix,) = opened.matrices
        if not streamed_first:
            assert matrix.step == pytest.approx(expected, rel=1e-12)
        assert torch.equal(values(matrix), tuned.double() - base.double())
        assert matrix.step == pytest.approx(expected, rel=1e-12)
    assert matrix.kind == "update" and matrix.precision == f"difference of {matrix.dtype}"
    assert torch.equal(values(matrix.base), base) and torch.equal(values(matrix.tuned), tuned)
    assert len(opened.files) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ulp_of_every_size(dtype):
    info = torch.finfo(dtype)
    x = torch.tensor([0.0, info.smallest_normal, -1.0, 1.5, -info.max, 3e-3], dtype=dtype)
    x = torch.cat([x, x[1:2] / 2, -x[1:2] * 2])
    smallest = info.smallest_normal * info.eps  # of 0 and of what is below the normal numbers
    exact = [smallest if v < info.smallest_normal else math.ldexp(info.eps, math.frexp(v)[1] - 1)
             for v in x.abs().double().tolist()]  # fmt: skip
    np.testing.assert_array_equal(torch.exp2(ulp_exponents(x).double()).numpy(), exact)


def test_a_difference_of_more_than_one_piece():
    base, tuned = random(700, 801).bfloat16(), random(700, 801, seed=1).bfloat16()
    assert base.numel() > 2 * PIECE
    (matrix,) = open_source({"w": tuned}, {"w": base}).matrices
    assert torch.equal(values(matrix), tuned.double() - base.double())
    assert matrix.step == pytest.approx(
        np.sqrt(np.mean(spacing(tuned) ** 2 + spacing(base) ** 2)), rel=1e-12
    )


def test_the_step_is_that_of_the_coarser_side(tmp_path):
    base, tuned = random(5, 5).bfloat16(), random(5, 5, seed=1)
    (matrix,) = open_source({"w": tuned}, {"w": base}).matrices
    expected = np.sqrt(np.mean(np.maximum(spacing(tuned), spacing(base)) ** 2))
    assert matrix.step == pytest.approx(expected, rel=1e-12)
    assert matrix.precision == "difference of float32 and bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True])
def test_the_rounding_edge_of_an_update(masters, dtype):
    """Trap A: the noise lies under the edge that `step` gives, whether an update was merged into
    a base of low precision or both are roundings of float32 masters."""
    W, B, A = 0.02 * random(256, 256), random(256, 4, seed=1), random(4, 256, seed=2)
    base = W.to(dtype)
    update = 1e-2 * base.float().norm() / (B @ A).norm() * (B @ A)
    tuned = ((W if masters else base.float()) + update).to(dtype)
    (matrix,) = open_source({"w": tuned}, {"w": base}).matrices
    s = torch.linalg.svdvals(values(matrix))
    edge = matrix.step / 12**0.5 * 2 * 256**0.5
    assert (s > edge).sum() == 4 and s[4] > (0.8 if masters else 0.5) * edge


def test_pairing_two_checkpoints(tmp_path):
    base = {f"h.{i}.weight": random(3, 3, seed=i) for i in range(3)}
    tuned = {f"transformer.{n}": t + 1 for n, t in base.items()}
    for left, right in ((tuned, base), (base, tuned)):
        opened = open_source(left, right)
        assert len(opened.matrices) == 3 and "transformer." in opened.notes[0]
        assert all((values(m).abs() - 1).abs().max() < 1e-6 for m in opened.matrices)
    kept = {**tuned, "lm_head.weight": random(2, 2)}
    with pytest.raises(SourceError, match=r"the base has no matrix lm_head: it has h.0, h.1"):
        open_source(kept, base)
    for settings in ({"allow_missing": True}, {"exclude": "lm_head"}):
        opened = open_source(kept, base, **settings)
        assert [m.name for m in opened.matrices] == [f"transformer.h.{i}" for i in range(3)]
    wider = {**base, "h.1.weight": random(4, 3)}
    opened = open_source(base, wider)
    assert reasons(opened) == {"h.1": "h.1 is (3, 3) in the source and (4, 3) in the base"}
    packed = {**base, "h.1.weight": torch.ones(3, 3, dtype=torch.int8)}
    assert "h.1 cannot be used: int8" in reasons(open_source(tuned, packed))["transformer.h.1"]
    less = {n: t for n, t in base.items() if n != "h.2.weight"}
    with pytest.raises(SourceError, match=r"the base has no matrix h.2: .*allow_missing"):
        open_source(base, less)
    opened = open_source(base, less, allow_missing=True)
    assert len(opened.matrices) == 2 and reasons(opened) == {"h.2": "the base has no such matrix"}
    opened = open_source(less, base)
    assert len(opened.matrices) == 2 and "1 matrices that the source lacks: h.2" in opened.notes[-1]
    opened = open_source(base, {**less, "h.2.weight": torch.ones(3, 3, dtype=torch.int8)})
    assert "cannot be used: int8" in reasons(opened)["h.2"]
    with pytest.raises(SourceError, match="no matrix to look at"):
        open_source({"w": random(2, 3)}, {"w": random(4, 4)})


# -- modules ---------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_a_module_says_how_its_weights_are_matrices(net):
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"net": net, "gpt": Conv1D(6, 4), "conv": nn.Conv2d(2, 5, 3)})
    nn.utils.parametrizations.weight_norm(model["net"].blocks[0]["up"])
    for source in (model, Wrapped(model), nn.DataParallel(model)):
        found = by_name(open_source(source))
        assert {m.kind for m in found.values()} == {"weight"}
        assert torch.equal(values(found["net.embed"]), net.embed.weight.T)
        assert torch.equal(values(found["gpt"]), model["gpt"].weight.T)
        assert torch.equal(values(found["conv"]), model["conv"].weight.flatten(1))
        assert torch.equal(values(found["net.blocks.0.up"]), net.blocks[0]["up"].weight)
        assert not any("parametrizations" in name for name in found)
    opened = open_source(copy.deepcopy(model), model.state_dict(), allow_missing=True)
    found = by_name(opened)
    assert found["gpt"].shape == (6, 4) and not values(found["gpt"]).any()


def test_tied_buffered_and_absent_weights_of_a_module(net):
    net.lm_head.weight = net.embed.weight
    net.register_buffer("cos", torch.ones(3, 3))
    net.blocks[0]["up"].to("meta")
    net.blocks[1]["up"].weight = nn.Parameter(torch.empty(0))
    opened = open_source(net)
    why = reasons(opened)
    assert why["lm_head"] == "the same storage as embed, which is looked at"
    assert why["cos"] == "a buffer, no weight" and "meta device" in why["blocks.0.up"]
    assert "empty" in why["blocks.1.up"] and len(opened.matrices) == 5
    found = by_name(open_source(net, exclude="embed"))
    assert "embed" not in found and torch.equal(values(found["lm_head"]), net.lm_head.weight)
    with pytest.raises(SourceError, match=r"the model: .*embed \(11 x 32\): on the meta device"):
        open_source(net.to("meta"))


def test_a_sharded_module_is_refused(tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(3, 2, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Replicate()]))
        with pytest.raises(SourceError, match=r"2 x 3\): sharded over processes: gather it"):
            open_source(model)
        model = sa.adapt(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), sa.LoRA(rank=1))
        model[0].A = nn.Parameter(distribute_tensor(model[0].A.data, mesh, [Replicate()]))
        opened = open_source(model)
        assert [m.name for m in opened.matrices] == ["1"]
        assert "0.A: sharded over processes" in reasons(opened)["0"]
    finally:
        dist.destroy_process_group()


# -- adapters of this library ----------------------------------------------------------------------


def check_updates(opened, model, net):
    """Every update against the model's own, the base's weight and the factors."""
    effective = by_name(opened, "effective")
    whole = effective or by_name(opened, "update")
    deltas = dict(sa.delta_weights(model))
    assert whole.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(values(whole[name]).float(), delta, rtol=1e-5, atol=1e-7)
        assert whole[name].step == 0.0
        W = net.get_submodule(name).weight
        if whole[name].base is not None:
            assert torch.equal(values(whole[name].base), W)
        if whole[name].magnitude is not None:
            drift = model.get_submodule(name).m.double() / W.double().norm(dim=1) - 1
            torch.testing.assert_close(whole[name].magnitude(), drift)
    for matrix in [m for m in opened.matrices if m.factors]:
        B, A = matrix.factors()
        torch.testing.assert_close(B @ A, values(matrix), rtol=1e-12, atol=1e-15)
        layer = model.get_submodule(matrix.name)
        product = layer.adapter.scale * layer.B.double() @ layer.A.double()
        torch.testing.assert_close(B @ A, product, rtol=1e-12, atol=1e-15)
    return effective


def test_an_adapter_with_and_without_its_base(net, adapter, tmp_path, train_a_little, monkeypatch):
    monkeypatch.setattr("structadapt.spectra.reading.matrix.CHUNK", 500)
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, adapter))
    sa.save(net, tmp_path / "a.safetensors")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    opened = open_source(net)
    assert all(m.base is not None for m in opened.matrices)
    dora = isinstance(adapter, sa.DoRA)
    assert bool(check_updates(opened, net, base)) == dora
    for below in (base, base.state_dict(), tmp_path / "base.safetensors", net):
        opened = open_source(tmp_path / "a.safetensors", below)
        assert bool(check_updates(opened, net, base)) == dora and not opened.skipped
    opened = open_source(tmp_path / "a.safetensors")
    assert all(m.base is None for m in opened.matrices)
    if dora:
        assert {m.kind for m in opened.matrices} == {"direction"}
        assert "pass base=" in opened.notes[-1]
    else:
        check_updates(opened, net, base)
    merged = by_name(open_source(net, base))
    for name, delta in sa.delta_weights(net):
        torch.testing.assert_close(values(merged[name]).float(), delta, rtol=1e-5, atol=1e-8)
        assert merged[name].step == 0.0 and "adapted weights" in merged[name].precision
    assert not values(merged["embed"]).any() and merged["embed"].shape == (32, 11)


def test_adapters_on_weights_that_are_stored_transposed(tmp_path, train_a_little):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"gpt": Conv1D(6, 4), "square": Conv1D(5, 5), "embed": nn.Embedding(7, 3)}
    )
    model["linear"] = nn.Linear(5, 5)
    base = copy.deepcopy(model)
    train_a_little(sa.adapt(model, sa.DoRA(rank=2), [".*"]), scale=0.5)
    sa.save(model, tmp_path / "a.safetensors")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    deltas = dict(sa.delta_weights(model))
    for below in (base, tmp_path / "base.safetensors"):
        found = by_name(open_source(tmp_path / "a.safetensors", below), "effective")
        assert found.keys() == deltas.keys()
        for name, delta in deltas.items():
            torch.testing.assert_close(values(found[name]).float(), delta, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_head_that_is_tied(net, tmp_path, train_a_little):
    net.lm_head.weight = net.embed.weight
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, sa.DoRA(rank=2), ["lm_head"]))
    sa.save(net, tmp_path / "a.safetensors")
    check_updates(open_source(tmp_path / "a.safetensors", base), net, base)


def test_an_adapter_over_the_wrong_base(net, tmp_path, train_a_little):
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, sa.LoRA(rank=2), ["attn"]))
    sa.save(net, tmp_path / "a.safetensors")
    state = {n: t for n, t in base.state_dict().items() if n != "blocks.0.attn.weight"}
    with pytest.raises(SourceError, match="the base has no matrix blocks.0.attn"):
        open_source(tmp_path / "a.safetensors", state)
    opened = open_source(tmp_path / "a.safetensors", state, allow_missing=True)
    first, second = opened.matrices
    assert first.base is None and second.base is not None
    assert "blocks.0.attn: the base has no such matrix" in opened.notes
    state["blocks.0.attn.weight"] = torch.ones(2, 3)
    opened = open_source(tmp_path / "a.safetensors", state)
    assert "is (32, 32) in the source and (2, 3) in the base" in reasons(opened)["blocks.0.attn"]
    with pytest.raises(SourceError, match="the base .*a.safetensors is an adapter"):
        open_source(base, tmp_path / "a.safetensors")


def test_a_training_run(tmp_path, net, train_a_little):
    train_a_little(sa.adapt(net, sa.LoRA(rank=2), ["attn"]))
    sa.save(net, tmp_path / "adapter.safetensors")
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text("{}")
    safetensors.torch.save_file({"x": random(2, 2)}, tmp_path / "zz.safetensors")
    opened = open_source(tmp_path)
    assert opened.what == "training run, adapter file" and len(opened.matrices) == 2
    opened = open_source(tmp_path, include=r"blocks\.1")
    assert [m.name for m in opened.matrices] == ["blocks.1.attn"]
    assert opened.notes == ["1 matrices were left out by include and exclude"]


def test_a_packed_tensor_is_no_matrix():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_(model[0], Int8WeightOnlyConfig())
    opened = open_source(model.state_dict())
    assert [m.name for m in opened.matrices] == ["1"]
    assert "dequantise it" in reasons(opened)["0"]


def test_quantised_layers_are_looked_at_as_they_compute():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    W = model[0].weight.detach().clone()
    quantize_(model, Int8WeightOnlyConfig())
    (matrix,) = open_source(model).matrices
    assert (values(matrix) - W).abs().max() < 2e-2 * W.abs().max()
    assert torch.equal(values(matrix), model[0].weight.dequantize())


# -- what is broken or hostile ---------------------------------------------------------------------


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Evil:
    def __reduce__(self):
        return os.system, ("echo pwned",)


GOOD = raw({"w": entry([2, 2], 0, 16)}, bytes(16))
BROKEN = {
    "empty": (b"", "is empty"),
    "short": (b"\x08\0\0", "truncated within its header"),
    "header cut": (GOOD[:20], "truncated within its header"),
    "data cut": (GOOD[:-4], "truncated: w should end at byte"),
    "trailing": (GOOD + b"more", "4 bytes behind its last tensor"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
    "header too large": (struct.pack("<Q", 2**40) + b"{}", "no safetensors file"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "no safetensors file"),
    "no json": (raw(b"{nope"), "header is damaged"),
    "deep json": (raw(b"{" + b'"a":{' * 100_000), "header is damaged"),
    "not utf-8": (raw(b'{"\xff\xfe": 1}'), "header is damaged"),
    "double name": (
        raw(b'{"w":%b,"w":%b}' % ((json.dumps(entry([2, 2], 0, 16)).encode(),) * 2), bytes(16)),
        "'w' is there twice",
    ),
    "wrong shape": (raw({"w": entry([2, 3], 0, 16)}, bytes(16)), r"w is float32 of shape \(2, 3\)"),
    "negative": (raw({"w": entry([-2, -2], 0, 16)}, bytes(16)), "w: its entry"),
    "text shape": (raw({"w": entry("22", 0, 16)}, bytes(16)), "w: its entry"),
    "huge shape": (raw({"w": entry([2**62, 2**62], 0, 16)}, bytes(16)), "w is float32"),
    "backwards": (raw({"w": entry([2, 2], 16, 0)}, bytes(16)), "w: its entry"),
    "overlap": (
        raw({"a": entry([2, 2], 0, 16), "b": entry([2, 2], 8, 24)}, bytes(24)),
        "b overlaps another",
    ),
    "gap": (
        raw({"a": entry([2, 2], 0, 16), "b": entry([1, 1], 20, 24)}, bytes(24)),
        "b lies behind",
    ),
    "no entry": (raw({"w": 5}), "w: its entry"),
    "bad metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "nothing in it": (raw({}), "no matrix to look at: it is empty"),
    "vectors alone": (raw({"w": entry([4], 0, 16)}, bytes(16)), r"w \(4\): 1-D"),
    "no rows": (raw({"w": entry([0, 4], 0, 0)}), r"w \(0 x 4\): empty"),
    "fp8 alone": (raw({"w": entry([2, 2], 0, 4, "F8_E4M3")}, bytes(4)), "w .*float8_e4m3fn"),
    "unknown dtype": (raw({"w": entry([2, 2], 0, 4, "F4_E2M1")}, bytes(4)), "w .*F4_E2M1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_safetensors_file_is_one_clear_error(tmp_path, case):
    data, message = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"broken.safetensors.*{message}"):
        open_source(path)


INDEXES = {
    "up": ("../secret.safetensors", "no plain name"),
    "deep up": ("a/../../secret.safetensors", "no plain name"),
    "absolute": ("/etc/secret.safetensors", "no plain name"),
    "windows": ("C:\\secret.safetensors", "no plain name"),
    "drive": ("C:secret.safetensors", "no plain name"),
    "folder": ("sub/secret.safetensors", "no plain name"),
    "dots": ("..", "no plain name"),
    "nothing": ("", "no plain name"),
    "NUL": ("a\0.safetensors", "control characters"),
    "newline": ("a\n.safetensors", "control characters"),
    "number": (7, "no text"),
    "list": (["a"], "no text"),
    "pickle": ("evil.pkl", "no .safetensors"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_opens_no_other_file(tmp_path, case):
    folder = tmp_path / "folder"
    name, message = INDEXES[case]
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    shards(folder, {"a": random(2, 2), "b": random(2, 2)}, {"a": name})
    with pytest.raises(SourceError, match=f"index.json: the file of 'a' is .*{message}"):
        open_source(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    names = shards(tmp_path, {"a": random(2, 2), "b": random(2, 2)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    opened = open_source(tmp_path)
    assert len(opened.matrices) == 1 and not opened.skipped
    index.write_text(json.dumps({"weight_map": {"a": names[0], "c": names[1]}}))
    with pytest.raises(SourceError, match=f"index.json names tensors .*c \\(in {names[1]}\\)"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys("ab", names[0])}))
    with pytest.raises(SourceError, match=f"b \\(in {names[0]}\\)"):
        open_source(tmp_path)
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(SourceError, match="'a' is there twice"):
        open_source(tmp_path)
    index.write_text(
        json.dumps({"weight_map": {"a": names[0], "b": "m1.safetensors", "c": "m2.safetensors"}})
    )
    with pytest.raises(
        SourceNotFoundError, match=r"2 of which are not there: m1.*, m2.safetensors"
    ):
        open_source(tmp_path)
    for text, message in (("[]", "no weight_map"), ('{"weight_map": {}}', "no weight_map")):
        index.write_text(text)
        with pytest.raises(SourceError, match=f"index.json has {message}"):
            open_source(tmp_path)
    for text, message in (("{", "is no JSON"), ("", "is empty"), ("[" * 200_000, "is no JSON")):
        index.write_text(text)
        with pytest.raises(SourceError, match=f"index.json {message}"):
            open_source(tmp_path)
    shards(tmp_path, {"a": random(2, 2), "b": random(2, 2)})
    (tmp_path / names[1]).write_bytes(GOOD[:-1])
    with pytest.raises(SourceError, match=f"{names[1]} is truncated"):
        open_source(tmp_path)


def test_pickles_that_are_not_tensors_alone(tmp_path, capfd):
    path = tmp_path / "x.pt"
    W = random(3, 3)
    for legacy in (True, False):
        for content in ({"w": W, "evil": Evil()}, nn.Linear(2, 2)):
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(SourceError, match="x.pt holds something else than tensors"):
                open_source(path)
    import pickle

    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(SourceError, match=r"x.pt (holds something else|is truncated or no file)"):
        open_source(path)
    assert "pwned" not in capfd.readouterr().out
    for content, message in (
        ([W], "holds a list, expected names and tensors"),
        ({"epoch": 3}, "holds no tensor: its keys are 'epoch'"),
        ({}, "holds no tensor: its keys are none"),
    ):
        torch.save(content, path)
        with pytest.raises(SourceError, match=f"x.pt {message}"):
            open_source(path)
    torch.save({"w": W}, path)
    data = path.read_bytes()
    for broken, message in (
        (data[: len(data) // 2], "truncated or no file of torch.save"),
        (b"", "is empty"),
        (b"junk", "truncated or no file of torch.save|holds something else"),
        (BROKEN["git lfs"][0], "git-LFS pointer"),
    ):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=f"x.pt.*{message}"):
            open_source(path)


def test_the_refusal_of_a_pickle_says_what_it_holds_and_what_is_expected(tmp_path):
    path = tmp_path / "x.pt"
    for legacy in (True, False):
        torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SourceError) as caught:
            open_source(path)
        assert str(caught.value) == (
            f"{path} holds something else than tensors (torch.nn.modules.linear.Linear), which "
            "could run code and was not run; expected a state dict saved with torch.save, or a "
            "safetensors file"
        )


def test_many_small_tensors_of_a_pickle_are_loaded_together(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    tensors = {f"{i}.weight": random(4, 3, seed=i) for i in range(300)}
    torch.save(tensors, path)
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(a) or load(*a, **k))
    matrices = open_source(path).matrices
    for matrix in matrices:
        assert torch.equal(torch.cat(list(matrix.rows())), tensors[f"{matrix.name}.weight"])
    assert len(matrices) == 300 and len(calls) == 2


def test_a_mapping_of_a_pickle_goes_away_with_what_it_read(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    torch.save({f"{i}.weight": random(4, 3) for i in range(12)}, path)
    monkeypatch.setattr(pickle_file, "FRESH", 4 * 4 * 3 * 4)  # four matrices
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(a) or load(*a, **k))
    for matrix in open_source(path).matrices:
        list(matrix.rows())
    assert len(calls) == 1 + 3


def test_a_pickle_that_is_written_while_it_is_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"0.weight": random(4, 3), "1.weight": random(4, 3)}, path)
    first, second = open_source(path).matrices
    list(first.rows())
    new = random(4, 3, seed=1)
    torch.save({"1.weight": new}, path)
    assert torch.equal(torch.cat(list(second.rows())), new)
    with pytest.raises(SourceError, match=r"0.weight is gone: was the file written"):
        list(first.rows())
    os.truncate(path, 100)
    with pytest.raises(SourceError, match="x.pt is truncated"):
        list(second.rows())
    path.unlink()
    with pytest.raises(SourceError, match="x.pt cannot be read: No such file"):
        list(second.rows())


def test_pickles_that_grow(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(256, 256)}, path)
    with zipfile.ZipFile(path) as old:
        parts = {part: old.read(part) for part in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)
    with pytest.raises(SourceError, match="x.pt has compressed parts, which torch.save does not"):
        open_source(path)
    for legacy in (True, False):
        spread = torch.zeros(1).expand(10**6, 10**6)
        torch.save({"w": spread}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SourceError, match="more values than the file holds"):
            open_source(path)


def test_paths_that_hold_nothing(tmp_path):
    for source, message in (
        (tmp_path / "no.safetensors", "no.safetensors is not there"),
        ("Qwen/Qwen9-0B", "a model of the Hub is downloaded first"),
        (tmp_path, "has no weights.*it is empty"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            open_source(source)
        assert isinstance(caught.value, ValueError)
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    with pytest.raises(
        SourceNotFoundError, match="link.safetensors is not there, a link to nothing"
    ):
        open_source(tmp_path / "link.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(SourceError, match="pipe.safetensors is no regular file"):
        open_source(tmp_path / "pipe.safetensors")
    with pytest.raises(SourceError, match="holds a NUL"):
        open_source("a\0b")
    with pytest.raises(SourceError, match="a int is no source"):
        open_source(3)
    with pytest.raises(SourceError, match="the state dict: .*it is empty"):
        open_source({})


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": random(8, 8)}, path)
    (matrix,) = open_source(path).matrices
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 8)
    with pytest.raises(SourceError, match="x.safetensors: w ends too early"):
        list(matrix.rows())


def test_broken_adapter_files(net, tmp_path):
    sa.adapt(net, sa.LoRA(rank=2), ["attn"])
    path = tmp_path / "a.safetensors"
    sa.save(net, path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()

    def opened(**changes):
        changed = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
        safetensors.torch.save_file(changed, path, metadata)
        return open_source(path)

    name = "blocks.0.attn.A"
    assert reasons(opened(**{name: None})) == {"blocks.0.attn": "A is missing"}
    assert (
        "expected floats of shape (2, 32)"
        in reasons(opened(**{name: torch.ones(3, 32)}))["blocks.0.attn"]
    )
    assert (
        "int64" in reasons(opened(**{name: torch.ones(2, 32, dtype=torch.int64)}))["blocks.0.attn"]
    )
    first, second = opened(**{name: torch.full((2, 32), torch.nan)}).matrices
    with pytest.raises(SourceError, match="a.safetensors: blocks.0.attn.A is not finite: 64 NaN"):
        first.factors()
    assert second.factors()[1].shape == (2, 32)
    with pytest.raises(SourceError, match="a.safetensors has tensors of no layer: x.A"):
        opened(**{"x.A": torch.ones(2)})
    metadata = {"structadapt": metadata["structadapt"].replace('"rank": 2', '"rank": -2')}
    with pytest.raises(SourceError, match="a.safetensors: LoRA: rank must be a positive"):
        opened()
