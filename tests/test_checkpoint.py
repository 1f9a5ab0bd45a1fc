"""Adapter files: exact round trips, and refusals that change nothing."""

import copy
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import structadapt as sa
from structadapt.checkpoint import AdapterFileError, read_adapters
from structadapt.files import UNSEALED, sealed, write_atomically


def parts(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"], safetensors.torch.load(data)


def write(path, metadata, tensors):
    """Sealed, as whoever writes such a file would."""
    text = re.sub('"sha256": "[0-9a-f]*"', f'"sha256": "{UNSEALED}"', metadata["structadapt"])
    path.write_bytes(sealed(safetensors.torch.save(tensors, {"structadapt": text})))


def edited(path, change):
    """The same file with its JSON description changed."""
    metadata, tensors = parts(path)
    header = json.loads(metadata["structadapt"])
    change(header)
    write(path, {"structadapt": json.dumps(header)}, tensors)


@pytest.fixture
def saved(net, tmp_path, train_a_little):
    """(a fresh copy of the base, an adapter file of it)"""
    base = copy.deepcopy(net)
    sa.save(train_a_little(sa.adapt(net, sa.LoRA(rank=2))), tmp_path / "adapter.safetensors")
    return base, tmp_path / "adapter.safetensors"


def test_a_round_trip_is_exact(net, ids, adapter, tmp_path, train_a_little):
    bare, path = copy.deepcopy(net), tmp_path / "a.safetensors"
    train_a_little(sa.adapt(net, adapter))
    expected = net(ids)
    sa.save(net, path)
    assert sa.load(bare, path) is bare
    assert torch.equal(bare(ids), expected) and sa.summary(bare) == sa.summary(net)
    assert {n: p.requires_grad for n, p in bare.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }
    train_a_little(bare)
    parameters = [id(p) for p in bare.parameters()]
    assert not torch.equal(bare(ids), expected)
    sa.load(bare, path)  # into an adapted model: the optimizer's parameters stay
    assert torch.equal(bare(ids), expected) and [id(p) for p in bare.parameters()] == parameters


def test_only_adapters_are_saved_and_merged_or_not_is_the_same(net, tmp_path, train_a_little):
    train_a_little(sa.adapt(sa.adapt(net, sa.QuanTA(init="paper"), "attn"), sa.DoRA(rank=2), "up"))
    sa.save(net, tmp_path / "a")
    with sa.merged(net):
        sa.save(net, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    names = {n for n in net.state_dict() if not n.endswith(("weight", "bias"))}
    assert parts(tmp_path / "a")[1].keys() == names
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) & stat.S_IRGRP
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_dtypes_follow_the_base(saved, ids):
    base, path = saved
    bare = sa.load(copy.deepcopy(base).double(), path)
    assert {p.dtype for p in sa.adapter_parameters(bare)} == {torch.float64}
    bare = sa.load(base.bfloat16(), path)
    assert {p.dtype for p in sa.adapter_parameters(bare)} == {torch.float32}
    assert bare(ids).dtype == torch.bfloat16


def refuse(model, path, words):
    """Loading is refused in one line, and leaves the model as it was."""
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterFileError, match=words) as error:
        sa.load(model, path)
    assert "\n" not in str(error.value)
    assert repr(model) == text and [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_every_truncation_is_refused(saved):
    base, path = saved
    data = path.read_bytes()
    for size in [0, 3, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        refuse(base, path, "is truncated or no safetensors file")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refuse(base, path, "is truncated or no safetensors file")


def test_a_file_of_the_format_without_a_seal_is_read(saved, ids):
    base, path = saved
    expected = sa.load(copy.deepcopy(base), path)(ids)
    edited(path, lambda header: (header.update(format=1), header.pop("sha256")))
    assert torch.equal(sa.load(base, path)(ids), expected)


def test_a_file_of_which_a_bit_is_another_one_is_refused(saved):
    base, path = saved
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        refuse(base, path, "adapter.safetensors")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuse(base, path, "was altered since it was saved: its content does not give its sha256")


def test_what_costs_more_than_it_is_worth_is_refused(saved, tmp_path):
    base, path = saved
    data = path.read_bytes()
    for header, words in [
        (b'{"a":[' + b"[]," * 2**19 + b"0]}", "more than .* 524288 values"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b'{"a":1,"a":2}', "'a' is there twice"),
        (b'{"%b":{}}' % (b"a" * 1001), "header is damaged"),
        (b'{"\\u001b":{"data_offsets":[0,0]}}', "its name holds control characters"),
    ]:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        refuse(base, path, words)
    os.truncate(path, 2**40)  # holes
    refuse(base, path, "is truncated or no safetensors file")
    path.write_bytes(data)
    edited(path, lambda h: h["layers"]["blocks.0.attn"].update(adapter="A" * 10**6))
    with pytest.raises(AdapterFileError, match="unknown adapter") as error:
        sa.load(base, path)
    assert len(str(error.value)) < 3000
    edited(path, lambda h: h["layers"].update({"a\n": h["layers"].pop("blocks.0.attn")}))
    refuse(base, path, "control characters|unknown adapter")
    path.unlink()
    os.mkfifo(path)
    refuse(base, path, "is no regular file")


def test_a_foreign_safetensors_file_is_refused(saved):
    base, path = saved
    safetensors.torch.save_file({"weight": torch.ones(2, 2)}, path)
    refuse(base, path, "is no structadapt adapter file")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h.update(format=3), "has format 3, this version reads 2: update"),
        (lambda h: h.update(format=1), "has format 1, this version reads 2: update"),
        (lambda h: h.pop("layers"), "description is damaged: KeyError"),
        (lambda h: h.update(layers=[1]), "description is damaged"),
        (lambda h: h.update(layers={}), "holds no layer"),
        (lambda h: h["layers"]["blocks.0.up"].update(adapter="VeRA"), "unknown adapter 'VeRA'"),
        (lambda h: h["layers"]["blocks.0.up"]["config"].update(rank=0), "rank must be a positive"),
        (lambda h: h["layers"]["blocks.0.up"]["config"].update(rank=3), r"blocks.0.up.A is torch.float32 of shape \(2, 32\), expected floats of shape \(3, 32\)"),  # noqa: E501
        (lambda h: h["layers"]["blocks.0.up"]["config"].update(rank=10**9), "rank must be a"),
        (lambda h: h["layers"]["blocks.0.up"]["config"].update(depth=1), "damaged: TypeError"),
        (lambda h: h["layers"]["blocks.0.up"].update(shape=[64]), "not enough values"),
        (lambda h: h["layers"]["blocks.0.up"].update(shape=[64, -1]), "impossible shape"),
        (lambda h: h["layers"]["blocks.0.up"].update(config=""), "no object, but ''"),
        (lambda h: h["layers"]["blocks.0.up"].update(config=[]), "no object, but"),
        (lambda h: h["layers"].pop("blocks.0.up"), "has tensors of no layer: blocks.0.up.A"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(saved, change, words):
    base, path = saved
    edited(path, change)
    refuse(base, path, words)


def test_a_description_that_says_something_twice_is_refused(saved):
    base, path = saved
    metadata, tensors = parts(path)
    text = metadata["structadapt"]
    metadata["structadapt"] = text.replace('"rank": 2', '"rank": 3, "rank": 2', 1)
    assert metadata["structadapt"] != text
    write(path, metadata, tensors)
    refuse(base, path, "'rank' is there twice")


def test_damaged_tensors_are_refused(saved):
    base, path = saved
    metadata, tensors = parts(path)
    for name, tensor, words in [
        ("blocks.0.up.A", None, "blocks.0.up.A is missing"),
        ("blocks.0.up.A", torch.full((2, 32), torch.nan), "blocks.0.up.A is not finite"),
        ("blocks.0.up.A", torch.ones(2, 32, dtype=torch.int32), "is torch.int32 of shape"),
        ("blocks.0.up.C", torch.ones(1), "has tensors of no layer: blocks.0.up.C"),
    ]:
        broken = {**tensors, name: tensor}
        write(path, metadata, {k: v for k, v in broken.items() if v is not None})
        refuse(base, path, words)


def test_an_adapter_for_another_model_is_refused(saved, train_a_little):
    base, path = saved
    other = copy.deepcopy(base)
    other.blocks[0]["up"] = nn.Linear(32, 48)
    refuse(other, path, r"blocks.0.up is 48 x 32 \(out x in\), the file has \(64, 32\)")
    del other.blocks[1]
    refuse(other, path, r"no layer blocks.1.attn to adapt \(near: blocks.0.attn.*\(and 1 more\)")
    refuse(sa.adapt(copy.deepcopy(base), sa.LoRA(rank=4)), path, r"blocks.0.attn has LoRA\(rank=4")
    refuse(sa.adapt(copy.deepcopy(base), sa.LoRA(rank=2), "up"), path, "blocks.0.attn is not adapt")
    wider = sa.adapt(copy.deepcopy(base), sa.LoRA(rank=2), ["all-linear", "lm_head"])
    refuse(wider, path, "the file has no lm_head")


def test_saving_is_all_or_nothing(net, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="no adapted layer"):
        sa.save(net, path)
    sa.save(sa.adapt(net, sa.LoRA(rank=2)), path)
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        sa.save(net, tmp_path / "nowhere" / "a.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    net.blocks[0]["up"].B.data.add_(1)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, call, full)
            sa.save(net, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    sa.save(net, path)
    assert path.read_bytes() != before
    with pytest.raises(FileNotFoundError):
        read_adapters(tmp_path / "missing")


def test_wrong_order_is_refused(saved, net, ids, train_a_little):
    base, path = saved
    with sa.merged(net), pytest.raises(RuntimeError, match="is merged: unmerge first"):
        sa.load(net, path)
    with pytest.raises(RuntimeError, match="is compiled: adapt first"):
        sa.load(torch.compile(base, backend="eager"), path)
    with pytest.raises(RuntimeError, match="blocks.0.attn is on the meta device: load the base"):
        sa.load(copy.deepcopy(base).to("meta"), path)


def test_a_compiled_model_saves_the_names_of_the_bare_one(net, tmp_path, train_a_little):
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, sa.LoRA(rank=2)))
    sa.save(net, tmp_path / "a")
    net.blocks[0]["up"] = torch.compile(net.blocks[0]["up"], backend="eager")
    sa.save(torch.compile(net, backend="eager"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    sa.load(base, tmp_path / "b")


def test_a_wrapped_model_saves_the_names_of_the_bare_one(net, tmp_path, train_a_little):
    train_a_little(sa.adapt(net, sa.LoRA(rank=2)))
    sa.save(net, tmp_path / "bare")
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, sa.AdaptedLinear))
    sa.save(nn.DataParallel(torch.compile(net, backend="eager")), tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "bare").read_bytes()


def test_a_layer_that_cannot_be_trained_is_not_loaded_into(tmp_path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    sa.save(sa.adapt(nn.Sequential(nn.Linear(4, 4)), sa.LoRA(rank=2)), tmp_path / "a")
    with pytest.raises(RuntimeError, match="0 was built under torch.inference_mode"):
        sa.load(model, tmp_path / "a", check_base=False)
    assert type(model[0]) is nn.Linear


def test_what_is_not_finite_is_not_saved(net, tmp_path):
    sa.adapt(net, sa.LoRA(rank=2))
    with torch.no_grad():
        net.blocks[0]["up"].B[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"blocks.0.up.B is not finite: not saved"):
        sa.save(net, tmp_path / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"config": {"axes": [8, 8, 8], "init": "identity"}},
        {"config": {"axes": 3, "init": "identity"}, "shape": [127, 127]},
        {"config": {"axes": 3, "init": "identity"}, "shape": [2**31 - 1, 16]},
        {"config": {"axes": 10**30, "init": "identity"}},
        {"config": {"axes": {}, "init": "identity"}},
        {"adapter": "LoRA", "config": {"rank": 10**30}},
        {"adapter": "LoRA", "config": {"alpha": 10**400}},
        {"adapter": "LoRA", "config": {"alpha": None}},
        {"adapter": ["LoRA"]},
        {"shape": [2**24, 2**24]},
    ],
    ids=str,
)
def test_hostile_descriptions_are_refused(net, tmp_path, entry):
    base, path = copy.deepcopy(net), tmp_path / "a"
    sa.save(sa.adapt(net, sa.QuanTA()), path)
    edited(path, lambda h: h["layers"]["blocks.0.attn"].update(entry))
    refuse(base, path, re.escape(str(path)))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        write_atomically(tmp_path / "pipe", b"all of it")
        assert read.result(10) == b"all of it"
    assert (tmp_path / "pipe").is_fifo() and len(os.listdir(tmp_path)) == 1


def test_links_and_modes_are_kept(net, tmp_path):
    sa.adapt(net, sa.LoRA(rank=2))
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    sa.save(net, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read_adapters(tmp_path / "real")
    assert stat.S_IMODE(os.stat(tmp_path / "real").st_mode) == 0o600


def test_savers_to_one_place_do_not_meet(net, tmp_path):
    """Every save is whole and none takes another's temporary file, within one process too."""
    sa.adapt(net, sa.LoRA(rank=2))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sa.save(net, tmp_path / "a"), range(64)))
    assert os.listdir(tmp_path) == ["a"] and read_adapters(tmp_path / "a")


def test_another_base_is_refused(saved, ids):
    base, path = saved
    assert sa.load(copy.deepcopy(base).bfloat16(), path)
    assert sa.load(copy.deepcopy(base).half(), path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.blocks[1]["up"].weight.mul_(1.01)
    refuse(other, path, "blocks.1.up has another base weight than the one that this adapter")
    assert sa.load(other, path, check_base=False) is other


def test_a_fingerprint_that_is_no_text_is_of_another_base(saved):
    base, path = saved
    edited(path, lambda header: header["layers"]["blocks.0.attn"].update(base=5))
    refuse(base, path, "blocks.0.attn has another base weight")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_base_is_the_same_in_another_dtype(net, tmp_path, cast):
    bare = copy.deepcopy(net)
    sa.save(sa.adapt(getattr(net, cast)(), sa.LoRA(rank=2)), tmp_path / "a")
    assert sa.load(bare, tmp_path / "a")


def test_a_trained_bias_is_saved(net, ids, tmp_path):
    bare = copy.deepcopy(net)
    sa.adapt(net, sa.LoRA(rank=2), "attn")
    for block in net.blocks:
        layer = block["attn"]
        layer.register_parameter("delta_bias", nn.Parameter(torch.ones(32)))
        layer.tensor_names += ("delta_bias",)
    sa.save(net, tmp_path / "a")
    assert not torch.equal(net(ids), bare(ids))
    assert torch.equal(sa.load(copy.deepcopy(bare), tmp_path / "a")(ids), net(ids))
    with sa.merged(net):
        expected = net(ids)
    torch.testing.assert_close(expected, net(ids))
    other = sa.adapt(bare, sa.LoRA(rank=2), "attn")
    refuse(other, tmp_path / "a", "blocks.0.attn has the tensors A, B, the file A, B, delta_bias")


def test_a_folder_that_is_no_peft_adapter(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder without adapter_config.json"):
        sa.load(net, tmp_path)
