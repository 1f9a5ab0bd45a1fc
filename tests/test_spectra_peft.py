"""Folders that PEFT wrote, against PEFT's own updates; and folders that are broken on purpose."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from structadapt.spectra.reading import SourceError, SourceNotFoundError, open_source

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"
)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(model, folder, seed=1, **settings):
    """The model with a PEFT adapter that has moved; its folder and a copy of the base beside it."""
    base = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted, base


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def values(matrix):
    whole = torch.cat(list(matrix.rows()))
    assert tuple(whole.shape) == matrix.shape
    return whole


def as_matrix(layer, delta):
    """(out, in) of what PEFT adds to the weight as it is stored."""
    stored_turned = type(layer.get_base_layer()).__name__ in ("Embedding", "Conv1D")
    return delta.T if stored_turned else delta.flatten(1)


def close(matrix, expected):
    torch.testing.assert_close(values(matrix).float(), expected, rtol=1e-6, atol=1e-6)


LORAS = {
    "lora": dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
    "patterns": dict(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        alpha_pattern={"v_proj": 11, "1.self_attn.q_proj": 3},
    ),
    "embedding": dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"]),
    "rank above the width": dict(r=20, lora_alpha=5, target_modules=["k_proj"]),
}


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("form", ["folder", "bin", "live"])
def test_updates_are_those_of_peft(llama, tmp_path, case, form):
    model, base = trained(llama, tmp_path, **LORAS[case])
    if form == "bin":
        path = tmp_path / "adapter_model.safetensors"
        torch.save(safetensors.torch.load_file(path), tmp_path / "adapter_model.bin")
        path.unlink()
    opened = open_source(model if form == "live" else tmp_path)
    layers = peft_layers(model)
    found = {m.name: m for m in opened.matrices}
    assert found.keys() == layers.keys() and not opened.skipped
    for name, layer in layers.items():
        matrix = found[name]
        assert matrix.kind == "update" and matrix.precision == "factors float32"
        expected = as_matrix(layer, layer.get_delta_weight("default").detach())
        close(matrix, expected)
        B, A = matrix.factors()
        torch.testing.assert_close((B @ A).float(), expected, rtol=1e-6, atol=1e-6)
        assert B.shape[1] == layer.r["default"]
    if form == "folder":
        assert len(opened.files) == 2
        base.save_pretrained(tmp_path / "base")
        for below in (base, tmp_path / "base"):
            for matrix in open_source(tmp_path, below).matrices:
                W = base.get_submodule(matrix.name).weight
                assert torch.equal(values(matrix.base), as_matrix(layers[matrix.name], W))


def merged_updates(model, base):
    """What PEFT's own merge changes, by layer."""
    layers = peft_layers(model)
    for name, layer in layers.items():
        layer.merge()
        yield (
            name,
            layer,
            (layer.get_base_layer().weight - base.get_submodule(name).weight).detach(),
        )
        layer.unmerge()


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens"]])
def test_dora_as_direction_and_as_a_whole(llama, tmp_path, targets):
    model, base = trained(llama, tmp_path, r=3, lora_alpha=5, use_dora=True, target_modules=targets)
    alone = open_source(tmp_path)
    assert {m.kind for m in alone.matrices} == {"direction"} and "pass base=" in alone.notes[-1]
    base.save_pretrained(tmp_path / "base")
    expected = {name: as_matrix(layer, d) for name, layer, d in merged_updates(model, base)}
    for opened in (
        open_source(tmp_path, tmp_path / "base"), open_source(tmp_path, base), open_source(model),
    ):  # fmt: skip
        effective = {m.name: m for m in opened.matrices if m.kind == "effective"}
        direction = {m.name: m for m in opened.matrices if m.kind == "direction"}
        assert effective.keys() == direction.keys() == expected.keys()
        for name, matrix in effective.items():
            close(matrix, expected[name])
            layer = peft_layers(model)[name]
            m = layer.lora_magnitude_vector["default"].weight.detach().double()
            W = as_matrix(layer, base.get_submodule(name).weight.detach().double())
            drift = m / W.norm(dim=1) - 1
            torch.testing.assert_close(matrix.magnitude(), drift, rtol=1e-5, atol=1e-6)
            product = as_matrix(layer, layer.get_delta_weight("default").detach())
            close(direction[name], product)


def test_layers_that_store_their_weight_transposed(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=12, n_layer=1, n_head=2)
    for use_dora in (False, True):
        gpt = transformers.GPT2LMHeadModel(config)
        model, base = trained(
            gpt, tmp_path / "adapter", r=2, lora_alpha=6, target_modules=["c_attn", "attn.c_proj"],
            fan_in_fan_out=True, use_dora=use_dora,
        )  # fmt: skip
        base.transformer.save_pretrained(tmp_path / "base")  # names without transformer.
        opened = open_source(tmp_path / "adapter", tmp_path / "base")
        assert any("'transformer.' is left out" in note for note in opened.notes)
        kind = "effective" if use_dora else "update"
        found = {m.name: m for m in opened.matrices if m.kind == kind}
        for name, layer, delta in merged_updates(model, base):
            close(found.pop(name), as_matrix(layer, delta))
        assert not found
        for matrix in opened.matrices:
            assert torch.equal(values(matrix.base), base.get_submodule(matrix.name).weight.T)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 5, 2), nn.Conv2d(4, 6, 3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(tmp_path, use_dora):
    torch.manual_seed(0)
    model, base = trained(
        Convolutions(),
        tmp_path,
        r=2,
        lora_alpha=3,
        target_modules=["one", "two"],
        use_dora=use_dora,
    )
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    kind = "effective" if use_dora else "update"
    for opened in (open_source(tmp_path, tmp_path / "base.safetensors"), open_source(model)):
        found = {m.name: m for m in opened.matrices if m.kind == kind}
        for name, _, delta in merged_updates(model, base):
            close(found.pop(name), delta.flatten(1))
        assert not found and not opened.skipped


def test_modules_that_are_trained_whole(llama, tmp_path):
    model, base = trained(
        llama, tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    opened = open_source(tmp_path)
    (left,) = opened.skipped
    assert left.name == "lm_head" and "trained whole beside the adapters" in left.reason
    base.save_pretrained(tmp_path / "base")
    opened = open_source(tmp_path, tmp_path / "base")
    (head,) = [m for m in opened.matrices if m.name == "lm_head"]
    tuned = model.base_model.model.lm_head.modules_to_save["default"].weight.detach()
    expected = tuned.double() - base.lm_head.weight.detach().double()
    assert torch.equal(values(head), expected) and head.step > 0 and not opened.skipped


def test_a_live_model_says_which_adapter_is_looked_at(llama, tmp_path):
    model, _ = trained(llama, tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    opened = open_source(model)
    assert [(s.name, "trained whole" in s.reason) for s in opened.skipped] == [("lm_head", True)]
    before = [values(m) for m in opened.matrices]
    model.merge_adapter()
    opened = open_source(model)
    assert all(m.base is None for m in opened.matrices) and "are merged" in opened.notes[0]
    assert all(torch.equal(values(m), b) for m, b in zip(opened.matrices, before, strict=True))
    model.unmerge_adapter()
    for layer in peft_layers(model).values():
        layer.scaling["default"] = 0.0
    with pytest.raises(SourceError, match="alpha must be a positive number, got 0.0"):
        open_source(model)


def test_embeddings_that_are_kept_beside_their_adapter(llama, tmp_path):
    model, base = trained(llama, tmp_path, r=2, target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in names)
    found = {m.name: m for m in open_source(tmp_path).matrices}
    embed = found["model.embed_tokens"]
    assert torch.equal(values(embed.base), base.model.embed_tokens.weight.T)


# -- folders that say something else, or are broken ------------------------------------------------


@pytest.fixture
def folder(llama, tmp_path):
    trained(llama, tmp_path, r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"])
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_rank_is_that_of_the_tensors(folder):
    before = {m.name: values(m) for m in open_source(folder).matrices}
    edit_config(folder, r=4)
    opened = open_source(folder)
    assert any("other ranks than the configuration says" in note for note in opened.notes)
    assert all(torch.equal(values(m), before[m.name]) for m in opened.matrices)


def test_notes_on_what_a_reader_has_to_know(folder):
    assert not open_source(folder).notes
    edit_config(folder, init_lora_weights="pissa", use_later=3, alora_invocation_tokens=[1])
    notes = " ".join(open_source(folder).notes)
    for part in ("'pissa'", "use_later", "acts on some tokens only"):
        assert part in notes


def test_one_bad_layer_is_skipped(folder):
    name = "model.layers.0.self_attn.q_proj"

    def reason(edit):
        edit_tensors(folder, edit)
        opened = open_source(folder)
        assert len(opened.matrices) == 3
        return {s.name: s.reason for s in opened.skipped}[name]

    A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    good = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert "ranks differ" in reason(lambda t: t.update({A: torch.ones(5, 16)}))
    assert "no factor" in reason(lambda t: t.update({A: torch.ones(2)}))
    assert "no factor" in reason(lambda t: t.update({A: torch.ones(0, 16)}))
    assert "int64" in reason(lambda t: t.update({A: torch.ones(2, 16, dtype=torch.int64)}))
    assert "lora_B is missing" in reason(lambda t: t.update({A: good[A]}) or t.pop(B))
    edit_tensors(folder, lambda t: t.update({B: torch.full_like(good[B], torch.nan)}))
    matrix = {m.name: m for m in open_source(folder).matrices}[name]
    with pytest.raises(SourceError, match="q_proj.lora_B.weight is not finite: 32 NaN"):
        matrix.factors()
    edit_config(folder, use_dora=True)
    with pytest.raises(SourceError, match="lora_magnitude_vector is missing, and use_dora is set"):
        open_source(folder)


def test_tensors_of_several_or_of_named_adapters(folder):
    def rename(tensors, *adapters):
        for key in list(tensors):
            tensor = tensors.pop(key)
            for adapter in adapters:
                tensors[key.replace(".weight", f".{adapter}.weight")] = tensor.clone()

    edit_tensors(folder, lambda t: rename(t, "default"))
    assert len(open_source(folder).matrices) == 4
    edit_tensors(
        folder, lambda t: t.update({k.replace("default", "b"): v.clone() for k, v in t.items()})
    )
    with pytest.raises(
        SourceError, match="several adapters, default, b|several adapters, b, default"
    ):
        open_source(folder)


def test_broken_folders(folder, tmp_path):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    for broken, message in (
        ("{", "adapter_config.json is no JSON"),
        ("[]", "adapter_config.json holds a list"),
        ('{"peft_type": "VERA"}', "peft_type 'VERA'"),
        (text.replace('"r": 2', '"r": 2, "r": 3'), "'r' is there twice"),
        (json.dumps({**json.loads(text), "alpha_pattern": []}), "alpha_pattern is"),
    ):
        config.write_text(broken)
        with pytest.raises(SourceError, match=message):
            open_source(folder)
    config.write_text(json.dumps({**json.loads(text), "alpha_pattern": {"(": 3}}))
    with pytest.raises(SourceError, match="_proj .*is not a regular expression"):
        open_source(folder)
    config.unlink()
    with pytest.raises(SourceNotFoundError, match="adapter_config.json is not there: without it"):
        open_source(folder)
    (folder / "sub").mkdir()
    weights.rename(folder / "sub" / "other.safetensors")
    with pytest.raises(SourceError, match="other.safetensors holds an adapter of PEFT"):
        open_source(folder / "sub")
    config.write_text(text)
    with pytest.raises(SourceNotFoundError, match="has adapter_config.json and neither"):
        open_source(folder)
    weights.write_bytes(data[:-1])
    with pytest.raises(SourceError, match="adapter_model.safetensors is truncated"):
        open_source(config)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "lora_E"),
        (peft.LoHaConfig(r=4, target_modules=["q_proj"]), "hada_w1_a"),
        (peft.VeraConfig(r=4, target_modules=["q_proj"]), "vera_lambda_b"),
    ],
)
def test_methods_whose_update_is_not_known_are_left_out_in_words(llama, config, part):
    model = peft.get_peft_model(llama, config)
    with pytest.raises(SourceError, match=f"q_proj.*{part} is of a variant of LoRA, or of another"):
        open_source(model)


def test_a_folder_with_a_part_of_another_variant(folder):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    layer = name.removesuffix(".lora_A.weight")
    tensors[f"{layer}.lora_diag"] = torch.ones(4)  # KaSA
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    source = open_source(folder)
    skipped = {s.name: s.reason for s in source.skipped}
    bad = layer.removeprefix("base_model.model.")
    assert "lora_diag is of a variant of LoRA" in skipped[bad]
    assert len(source.matrices) == 3 and bad not in {m.name for m in source.matrices}
    factors = (f"{layer}.lora_A", f"{layer}.lora_B")
    alone = {n: t for n, t in tensors.items() if not n.startswith(factors)}
    safetensors.torch.save_file(alone, path, {"format": "pt"})
    assert (
        "lora_diag is of a variant" in {s.name: s.reason for s in open_source(folder).skipped}[bad]
    )
