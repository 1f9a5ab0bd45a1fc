"""PEFT folders and merged checkpoints: PEFT's own numbers, and refusals that change nothing."""

import contextlib
import copy
import errno
import json
import os
import re
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt.checkpoint import AdapterFileError
from structadapt.interop import export_merged, export_peft, expressions, load_peft
from structadapt.layers import find_adapted

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VOCABULARY = 29


pytestmark = pytest.mark.usefixtures("one_thread")  # threads cost more than these tiny products


def llama(tie=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=16
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # they start at 0
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


class Conv(nn.Module):
    """Images (batch, 3, 9, 9) and an id each to logits."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, **options)
        self.line = nn.Conv1d(6, 5, 3)
        self.table = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, ids, images):
        x = self.line(torch.tanh(self.conv(images)).flatten(2)).mean(2)
        return self.head(x + self.table(ids))


def conv(**options):
    torch.manual_seed(0)
    return Conv(**options).eval()


def inputs(model):
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, Conv):
        images = torch.randn(2, 3, 9, 9, generator=generator)
        return {"ids": torch.tensor([1, 5]), "images": images.requires_grad_()}
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=generator)
    table = model.get_input_embeddings()
    if isinstance(getattr(table, "base_layer", table), nn.Embedding) and (
        hasattr(table, "base_layer") or table in find_adapted(model).values()
    ):
        return {"input_ids": ids}
    return {"inputs_embeds": table(ids).detach().requires_grad_()}


def outputs(model, given):
    result = model(**given)
    return getattr(result, "logits", result)


def run(model, base):
    """(logits, {name: gradient}) of a loss that weighs all logits differently."""
    given = inputs(base)
    logits = outputs(model, given)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (logits * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, tensor in given.items():
        if tensor.grad is not None:
            grads[name] = tensor.grad
    return logits.detach(), grads


NAMES = {
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "lora_embedding_A.default": "A",
    "lora_embedding_B.default": "B",
    "lora_magnitude_vector.default.weight": "m",
    "lora_B.default.bias": "delta_bias",
    "base_layer.bias": "delta_bias",
}


def renamed(wrapped, grads):
    """PEFT's gradients under our names and shapes: lora_B.bias is multiplied by the scale."""
    ours = {}
    for name, grad in grads.items():
        theirs = next((n for n in NAMES if name.endswith(f".{n}")), None)
        if theirs is None:
            ours[name] = grad
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(f".{theirs}")
        if theirs == "lora_B.default.bias":
            grad = grad / wrapped.get_submodule(f"base_model.model.{layer}").scaling["default"]
        kind = NAMES[theirs]
        ours[f"{layer}.{kind}"] = grad.flatten() if kind in ("m", "delta_bias") else grad.flatten(1)
    return ours


def assert_same(model, wrapped):
    """Outputs and the gradient of every adapter tensor and of the inputs."""
    logits, grads = run(model, model)
    expected, theirs = run(wrapped, model)
    torch.testing.assert_close(logits, expected, **CLOSE)
    theirs = renamed(wrapped, theirs)
    assert grads.keys() == theirs.keys()
    assert {"A", "B"} <= {name.rsplit(".", 1)[-1] for name in grads}
    for name, grad in grads.items():
        scale = theirs[name].abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, theirs[name] / scale, **CLOSE, msg=name)


def randomise(parameters, scale=0.1, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


PEFT_SAYS = (  # each of its warnings that a case here provokes
    "`is_gradient_checkpointing` is deprecated",
    ".*lora_bias=True. was passed but the targeted layer",
    "Setting `save_embedding_layers`",
    "Could not identify embedding layer",
    "Could not find a config file",
    "Model has `tie_word_embeddings=True` and a tied layer",
    "Adapter 'default': . LoRA tensor.s. have invalid shape: .*lora_B.bias",  # they are whole
)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        for text in PEFT_SAYS:
            warnings.filterwarnings("ignore", text)
        yield


def wrap(base, **options):
    """A PEFT model with random adapters."""
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    randomise(p for p in wrapped.parameters() if p.requires_grad)
    return wrapped.eval()


def save(wrapped, folder):
    with quiet():
        wrapped.save_pretrained(folder)
    return folder


def reopen(base, folder):
    with quiet():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    return model.eval()


ATTENTION = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"r": 3, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
PATTERNS = {
    **ATTENTION,
    "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.mlp.*": 6},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "down_proj": 0.5},
}
IMPORTS = {
    "LoRA": (llama, ATTENTION),
    "rsLoRA": (llama, {**ATTENTION, "use_rslora": True}),
    "DoRA": (llama, {**ATTENTION, "use_dora": True}),
    "rsDoRA, every layer": (
        llama,
        {"r": 2, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    "patterns": (llama, PATTERNS),
    "patterns, rsLoRA": (llama, {**PATTERNS, "use_rslora": True}),
    "expression": (llama, {"target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    "some layers": (llama, {**ATTENTION, "layers_to_transform": [1]}),
    "one layer, by pattern": (
        llama,
        {**ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "all but": (llama, {**ATTENTION, "exclude_modules": ["0.self_attn.q_proj"]}),
    "lora_bias, no bias": (llama, {**ATTENTION, "lora_bias": True}),
    "head": (llama, {"target_modules": ["lm_head", "o_proj"]}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding, DoRA": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "Conv1D": (gpt2, GPT2),
    "Conv1D, rsLoRA": (gpt2, {**GPT2, "use_rslora": True}),
    "Conv1D, DoRA": (gpt2, {**GPT2, "use_dora": True}),
    "lora_bias": (gpt2, {**GPT2, "lora_bias": True, "lora_alpha": 12}),
    "bias lora_only": (gpt2, {**GPT2, "bias": "lora_only"}),
    "bias lora_only, DoRA": (gpt2, {**GPT2, "bias": "lora_only", "use_dora": True}),
    "both biases": (gpt2, {**GPT2, "bias": "lora_only", "lora_bias": True}),
    "convolutions": (conv, {"r": 2, "target_modules": ["conv", "line", "table", "head"]}),
    "convolutions, DoRA": (
        conv,
        {"r": 2, "target_modules": ["conv", "line", "head"], "use_dora": True},
    ),
    "convolutions, bias": (
        conv,
        {"r": 2, "target_modules": ["conv", "line"], "lora_bias": True},
    ),
}


@pytest.mark.parametrize("build, options", IMPORTS.values(), ids=IMPORTS.keys())
def test_a_folder_of_peft_gives_pefts_outputs_and_gradients(build, options, tmp_path):
    base = build()
    wrapped = wrap(base, **options)
    save(wrapped, tmp_path)
    model = load_peft(copy.deepcopy(base), tmp_path)
    assert_same(model, wrapped)
    trained = {id(t) for t in sa.adapter_parameters(model)}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    logits = outputs(model, inputs(model)).detach()
    randomise(sa.adapter_parameters(model))
    held = [*sa.adapter_parameters(model)]
    load_peft(model, tmp_path)  # into an adapted model: the optimizer's parameters stay
    assert torch.equal(outputs(model, inputs(model)), logits)
    assert all(a is b for a, b in zip(held, sa.adapter_parameters(model), strict=True))


def test_tied_layers_are_imported_as_peft_has_them(tmp_path):
    base, given = llama(tie=True), {"input_ids": torch.arange(12).reshape(2, 6)}
    wrapped = wrap(base, target_modules=["lm_head", "q_proj"])
    model = load_peft(copy.deepcopy(base), save(wrapped, tmp_path / "head"))
    torch.testing.assert_close(outputs(model, given), outputs(wrapped, given), **CLOSE)
    wrapped = wrap(base, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    save(wrapped, tmp_path / "both")  # with tensors of lm_head, which target_modules leaves out
    with pytest.warns(UserWarning, match="ensure_weight_tying: adapters of tied layers"):
        model = load_peft(copy.deepcopy(base), tmp_path / "both")
    torch.testing.assert_close(outputs(model, given), outputs(wrapped, given), **CLOSE)


def test_import_then_export_is_the_same_folder(tmp_path):
    for i, (build, options) in enumerate(IMPORTS.values()):
        base, first, second = build(), tmp_path / f"{i}", tmp_path / f"{i}b"
        export_peft(load_peft(base, save(wrap(base, **options), first)), second)
        again = load_peft(build(), second)
        before, after = find_adapted(base), find_adapted(again)
        assert before.keys() == after.keys()
        for name, layer in before.items():
            assert after[name].adapter == layer.adapter
            for key, tensor in layer.tensors().items():
                torch.testing.assert_close(after[name].tensors()[key], tensor, rtol=1e-6, atol=1e-7)


EVERY = [r".*_proj"]
EXPORTS = {
    "LoRA": (llama, [(sa.LoRA(rank=3), EVERY)]),
    "rsLoRA": (llama, [(sa.LoRA(rank=3, scaling="alpha/sqrt(r)"), EVERY)]),
    "constant": (llama, [(sa.LoRA(rank=3, alpha=0.7, scaling="constant"), EVERY)]),
    "DoRA": (llama, [(sa.DoRA(rank=3), EVERY)]),
    "one layer": (llama, [(sa.LoRA(rank=2), ["layers.1.self_attn.q_proj"])]),
    "ranks and scales": (
        llama,
        [
            (sa.LoRA(rank=2, alpha=4.0), ["q_proj", "k_proj"]),
            (sa.LoRA(rank=5, alpha=3.0, scaling="alpha/sqrt(r)"), ["v_proj"]),
            (sa.LoRA(rank=2, alpha=0.3, scaling="constant"), ["layers.0.mlp.up_proj"]),
        ],
    ),
    "ranks, rsDoRA": (
        llama,
        [
            (sa.DoRA(rank=2, scaling="alpha/sqrt(r)"), ["q_proj"]),
            (sa.DoRA(rank=7, scaling="alpha/sqrt(r)"), ["0.self_attn.v_proj"]),
        ],
    ),
    "embedding and head": (llama, [(sa.LoRA(rank=3), ["embed_tokens", "lm_head", "q_proj"])]),
    "embedding, DoRA": (llama, [(sa.DoRA(rank=3), ["embed_tokens"])]),
    "Conv1D": (gpt2, [(sa.LoRA(rank=3), ["c_attn", "mlp.c_proj"])]),
    "Conv1D, DoRA": (gpt2, [(sa.DoRA(rank=3), ["c_attn", "mlp.c_proj"])]),
    "Conv1D and embedding, DoRA": (gpt2, [(sa.DoRA(rank=3), ["c_attn", "wte"])]),
    "convolutions": (conv, [(sa.LoRA(rank=2), ["conv", "line", "table"])]),
    "convolutions, DoRA": (conv, [(sa.DoRA(rank=2), ["conv", "line", "head"])]),
}


def adapted(build, layers):
    model = build()
    for adapter, target in layers:
        sa.adapt(model, adapter, target)
    randomise(sa.adapter_parameters(model))
    return model


@pytest.mark.parametrize("build, layers", EXPORTS.values(), ids=EXPORTS.keys())
def test_peft_loads_an_exported_folder_and_computes_the_same(build, layers, tmp_path):
    model = adapted(build, layers)
    errors = export_peft(model, tmp_path / "a")
    assert errors == dict.fromkeys(find_adapted(model), 0.0)
    assert_same(model, reopen(build(), tmp_path / "a"))
    assert sorted(os.listdir(tmp_path / "a")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(folder / "adapter_model.safetensors")


def rewrite(folder, config=(), tensors=()):
    """The same folder with some settings or tensors changed; None takes a tensor out."""
    settings, weights = read(folder)
    settings.update(config)
    weights.update(tensors)
    weights = {k: v.contiguous() for k, v in weights.items() if v is not None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def test_exported_folders_are_plain_and_reproducible(tmp_path):
    model = adapted(llama, EXPORTS["ranks and scales"][1])
    export_peft(model, tmp_path / "a")
    with sa.merged(model), sa.disabled(model):
        export_peft(model, tmp_path / "b")
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config, _ = read(tmp_path / "a")
    assert config["r"] == 2 and config["lora_alpha"] == 4 and not config["use_rslora"]
    assert config["rank_pattern"] == {
        rf"^model\.layers\.{i}\.self_attn\.v_proj": 5 for i in range(2)
    }
    assert config["target_modules"] == sorted(find_adapted(model))  # up_proj of one layer only
    compiled = torch.compile(model, backend="eager")
    export_peft(compiled, tmp_path / "a")  # over the old one
    assert read(tmp_path / "a")[0] == config


def test_a_model_in_pefts_clothes_is_exported_without_them(tmp_path):
    bridge = pytest.importorskip("structadapt.integrations.peft_tuner")
    config = bridge.StructAdaptConfig(adapter=sa.LoRA(rank=2), target_modules=["q_proj"])
    with quiet():
        wrapped = peft.get_peft_model(llama(), config).eval()
    randomise(sa.adapter_parameters(wrapped))
    export_peft(wrapped, tmp_path / "a")
    export_merged(wrapped, tmp_path / "m")
    given = {"input_ids": torch.arange(12).reshape(2, 6)}
    for loaded in (reopen(llama(), tmp_path / "a"), from_folder(tmp_path / "m")):
        torch.testing.assert_close(outputs(loaded, given), outputs(wrapped, given), **CLOSE)


def test_target_modules_mean_the_adapted_layers_alone(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    export_peft(sa.adapt(net, sa.LoRA(rank=1), lambda name, _: name == "a"), tmp_path / "a")
    assert read(tmp_path / "a")[0]["target_modules"] == "a"  # an expression: ["a"] is both
    both = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    export_peft(sa.adapt(both, sa.LoRA(rank=1), "a"), tmp_path / "a")
    assert read(tmp_path / "a")[0]["target_modules"] == ["a"]


# -- for servers -----------------------------------------------------------------------------------


def assert_served(folder):
    """The rules of vLLM's and SGLang's loaders."""
    config, tensors = read(folder)
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["lora_alpha"] == config["r"] and config["bias"] == "none"
    unset = ["use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"]
    assert not any(config.get(key) for key in unset) and "lora_bias" not in config
    modules = set()
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found and tensor.dim() == 2 and tensor.shape["AB".index(found[2])] == config["r"]
        modules.add(found[1])
    assert len(tensors) == 2 * len(modules)
    assert config["target_modules"] == sorted({name.rsplit(".", 1)[-1] for name in modules})


def test_serve_safe_is_uniform_and_exact(tmp_path):
    layers = [
        (sa.LoRA(rank=2, alpha=4.0), ["q_proj", "k_proj"]),
        (sa.LoRA(rank=5, alpha=3.0, scaling="alpha/sqrt(r)"), ["v_proj", "lm_head"]),
        (sa.LoRA(rank=1, alpha=0.3, scaling="constant"), ["up_proj"]),
    ]
    model = adapted(llama, layers)
    assert {*export_peft(model, tmp_path, serve_safe=True).values()} == {0.0}
    assert_served(tmp_path)
    assert read(tmp_path)[0]["r"] == 5
    expected = outputs(model, inputs(model))
    for loaded in (reopen(llama(), tmp_path), load_peft(llama(), tmp_path)):
        torch.testing.assert_close(outputs(loaded, inputs(model)), expected, **CLOSE)


@pytest.mark.parametrize("serve_safe", [True, False])
def test_any_adapter_becomes_the_nearest_lora(serve_safe, tmp_path):
    layers = [
        (sa.DoRA(rank=2), ["q_proj"]),
        (sa.QuanTA(), ["o_proj"]),
        (sa.LoRA(rank=6), ["up_proj"]),
        (sa.LoRA(rank=2), ["down_proj"]),
    ]
    model = adapted(llama, layers)
    errors = export_peft(model, tmp_path, serve_safe=serve_safe, svd_rank=4)
    if serve_safe:
        assert_served(tmp_path)
    loaded = load_peft(llama(), tmp_path)
    found = dict(sa.delta_weights(loaded))
    for name, delta in sa.delta_weights(model):
        values = torch.linalg.svdvals(delta.double())
        best = (values[4:].norm() / values.norm()).item()  # Eckart and Young
        off = ((found[name] - delta).double().norm() / delta.double().norm()).item()
        assert errors[name] == pytest.approx(best, rel=1e-4, abs=1e-6) and abs(off - best) < 1e-5
        assert (errors[name] == 0) == name.endswith("down_proj")
    reopened = outputs(reopen(llama(), tmp_path), inputs(model))
    torch.testing.assert_close(reopened, outputs(loaded, inputs(model)), **CLOSE)


def test_a_full_rank_svd_is_exact_also_for_an_update_of_nothing(tmp_path):
    model = adapted(llama, [(sa.QuanTA(), ["q_proj", "k_proj"])])
    sa.adapt(model, sa.DoRA(rank=2), "up_proj")  # at its start
    errors = export_peft(model, tmp_path, serve_safe=True, svd_rank=64)
    assert max(errors.values()) < 1e-6
    assert read(tmp_path)[0]["r"] == 32  # no layer has more
    logits = outputs(reopen(llama(), tmp_path), inputs(model))
    torch.testing.assert_close(logits, outputs(model, inputs(model)), **CLOSE)


# -- refusals: import ------------------------------------------------------------------------------


def state(model):
    return repr(model), [(n, p.requires_grad, p.clone()) for n, p in model.named_parameters()]


def assert_untouched(model, before):
    text, parameters = state(model)
    assert text == before[0]
    for (name, trained, value), (old, old_trained, old_value) in zip(
        parameters, before[1], strict=True
    ):
        assert (name, trained) == (old, old_trained)
        assert torch.equal(value.nan_to_num(), old_value.nan_to_num())


def refuse(folder, words, model=None, error=AdapterFileError):
    model = model or llama()
    before = state(model)
    with pytest.raises(error, match=words) as caught:
        load_peft(model, folder)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: a fresh copy of a PEFT folder, saved once for each set of options."""
    made = {}

    def copied(build=llama, **options):
        key = repr((build, options))
        if key not in made:
            made[key] = save(wrap(build(), **options), tmp_path_factory.mktemp("saved"))
        fresh = tmp_path_factory.mktemp("copy")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (fresh / name).write_bytes((made[key] / name).read_bytes())
        return fresh

    return copied


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', this library reads 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: whole modules are trained"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set.*merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"use_bdlora": {}, "arrow_config": {"top_k": 1}}, "arrow_config is set"),
        ({"velora_config": {"scale": 1}}, "velora_config is set"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4': training began by changing"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"use_newlora": True}, "use_newlora is set, which this version does not know"),
        ({"bias": "some"}, "bias is 'some', expected"),
        ({"lora_alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"lora_alpha": 1e300}, "alpha must be a positive number, got 1e[+]300"),
        ({"lora_alpha": "8"}, "alpha must be a positive number, got '8'"),
        ({"r": 0}, "rank must be a positive integer, got 0"),
        ({"r": 5}, r"lora_A.weight has the shape \(4, 56\), expected \(5, 56\) for rank 5"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has the shape \(4, 32\)"),
        ({"rank_pattern": [2]}, r"rank_pattern is \[2\]"),
        ({"alpha_pattern": {"(": 2}}, r"'.*\(.*' is not a regular expression"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"layers_to_transform": [1]}, "0.mlp.down_proj has tensors, and target_modules leaves"),
        ({"target_modules": ["q_proj"]}, "0.mlp.down_proj has tensors, and target_modules leaves"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]},
            "target_modules names model.layers.0.mlp.up_proj, which has no tensors",
        ),
        ({"use_dora": True}, "down_proj.lora_magnitude_vector is missing, expected for use_dora"),
        ({"lora_bias": True}, "lora_B.bias is missing, expected for lora_bias"),
    ],
    ids=str,
)
def test_a_configuration_that_is_no_plain_adapter_is_refused(folder_of, config, words):
    folder = folder_of(**ATTENTION)
    rewrite(folder, config)
    refuse(folder, words)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({f"{Q}.lora_A.weight": None}, "0.self_attn.q_proj.lora_A.weight is missing"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 3)}, r"expected \(32, 4\) for rank 4"),
        ({f"{Q}.lora_B.weight": torch.full((32, 4), torch.nan)}, "lora_B.weight is not finite"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 4).int()}, "lora_B.weight is torch.int32"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, "of DoRA, but use_dora is not set"),
        ({f"{Q}.lora_B.bias": torch.ones(32)}, "unexpected tensor .*q_proj.lora_B.bias"),
        ({f"{Q}.lora_C.weight": torch.ones(32)}, "unexpected tensor .*q_proj.lora_C.weight"),
        ({"model.q_proj.lora_A.weight": torch.ones(4, 4)}, "unexpected tensor model.q_proj"),
        (
            {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            r"no layer model.layers.7.self_attn.q_proj \(near: model.layers.0.self_attn.q_proj",
        ),
        (
            {"base_model.model.model.norm.lora_A.weight": torch.ones(4, 32)},
            "model.norm is a LlamaRMSNorm: it cannot be adapted",
        ),
        ({"base_model.model.model.norm.weight": torch.ones(32)}, None),  # the model's own
        ({"base_model.model.model.norm.weight": torch.zeros(32)}, "norm.weight is trained beside"),
        ({"base_model.model.model.norm.weight": torch.ones(31)}, r"\(31,\), the model's \(32,\)"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tensors_that_do_not_fit_are_refused(folder_of, tensors, words):
    folder = folder_of(**ATTENTION)
    rewrite(folder, tensors=tensors)
    if words is None:
        load_peft(llama(), folder)
    else:
        refuse(folder, words)


def test_a_layer_that_is_missing_among_some_layers_is_refused(folder_of):
    folder = folder_of(**ATTENTION, layers_to_transform=[0, 1])
    rewrite(folder, tensors={k: None for k in read(folder)[1] if ".1.self_attn.v_proj." in k})
    refuse(folder, "target_modules names model.layers.1.self_attn.v_proj, which has no tensors")


def test_a_setting_that_is_there_twice_is_refused(folder_of):
    folder = folder_of(**ATTENTION)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha"', '"lora_alpha": 99, "lora_alpha"', 1))
    refuse(folder, "is no JSON: 'lora_alpha' is there twice")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*)*!", r"(?:\w+\.)*q_proj", ".*" * 12 + "!", ".?" * 40, "(a|aa)*!", "(",
     "a" * 10_001, "a{99999999999}", "(?=(.*)*!)x", "(x?)" * 60],
)  # fmt: skip
def test_an_expression_that_could_take_for_ever_is_refused(folder_of, pattern):
    for settings in ({"target_modules": pattern}, {"rank_pattern": {pattern: 2}}):
        folder = folder_of(**ATTENTION)
        rewrite(folder, config=settings)
        refuse(folder, "could take for ever: name the layers|is not a regular expression")


@pytest.mark.parametrize(
    "pattern, text, found",
    [
        (r".*\.(q_proj|v_proj)", "model.layers.3.self_attn.q_proj", True),
        (r"^(?!.*vision).*(q|k|v)_proj$", "model.layers.3.self_attn.k_proj", True),
        (r"model\.layers\.\d+\.self_attn\.[qkvo]_proj", "model.layers.31.self_attn.o_proj", True),
        (r"(?:foo|bar)*_proj", "foobarfoo_proj", True),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))",
            "model.language_model.layers.10.self_attn.q_proj",
            True,
        ),
        (r"q_proj", "model.q_proj", False),
    ],
)
def test_expressions_as_people_write_them(pattern, text, found):
    assert bool(expressions.match(pattern, text, whole=True)) == found


def test_many_patterns_and_wrong_types_are_refused(folder_of):
    folder = folder_of(**ATTENTION)
    rewrite(folder, config={"rank_pattern": {f"{i}x": 2 for i in range(5000)}})
    refuse(folder, "rank_pattern has 5000 patterns")
    folder = folder_of(**ATTENTION)
    rewrite(folder, config={"target_parameters": 1})
    refuse(folder, "target_parameters is 1")


def test_damaged_folders_are_refused(folder_of, tmp_path):
    folder = folder_of(**ATTENTION)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for size in (0, 9, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        refuse(folder, "is truncated or no safetensors file")
    for text in ("", "{", "[" * 10**5, "[]"):
        (folder / "adapter_config.json").write_text(text)
        refuse(folder, "is no JSON|holds a list, expected an object")
    refuse(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    folder = folder_of(**ATTENTION)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refuse(folder, "adapter_model.bin, a pickle, which can run code")
    rewrite(folder := folder_of(**ATTENTION), tensors=dict.fromkeys(read(folder)[1]))
    refuse(folder, "it holds no adapter")


def test_a_folder_of_another_model_is_refused(folder_of):
    folder = folder_of(target_modules=["embed_tokens", "lm_head"])
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    refuse(folder, "lm_head.weight is trained beside the adapters, or of another base", model)
    model = llama()
    model.resize_token_embeddings(40, mean_resizing=False)
    refuse(folder, r"lm_head.lora_B.weight has the shape \(29, 8\), expected \(40, 8\)", model)
    refuse(folder_of(**ATTENTION), "the model has no layer model.layers.0", gpt2())
    refuse(folder_of(conv, r=2, target_modules=["conv"]), "conv has groups=3", conv(groups=3))
    limited = conv()
    limited.table.max_norm = 1.0
    refuse(folder_of(conv, r=2, target_modules=["table"]), "table has max_norm", limited)
    refuse(folder_of(conv, r=2, target_modules=["conv"]), "conv has dilation=", conv(dilation=2))


def test_trained_biases_need_a_place(folder_of):
    folder = folder_of(gpt2, **GPT2, bias="all")
    refuse(folder, "bias is trained beside the adapters", gpt2())
    config, tensors = read(folder)
    model = gpt2()
    own = dict(model.named_parameters())
    frozen = {
        name: own[name.removeprefix("base_model.model.")]
        for name in tensors
        if name.endswith(".bias") and "base_layer" not in name
    }
    assert frozen  # the norms and projections that are not adapted
    rewrite(folder, tensors=frozen)
    load_peft(model, folder)
    bias = next(name for name in tensors if name.endswith("base_layer.bias"))
    rewrite(folder, tensors={bias: None})
    refuse(folder, r"base_layer.bias is missing, expected for bias='all'", gpt2())
    folder = folder_of(gpt2, **GPT2, bias="lora_only")
    rewrite(folder, {"bias": "none"})
    refuse(folder, "unexpected tensor .*base_layer.bias", gpt2())
    assert config["bias"] == "all"


def test_an_adapted_model_must_have_the_same_adapters(folder_of):
    folder = folder_of(gpt2, **GPT2, lora_bias=True)
    same = {"target": ["c_attn", "mlp.c_proj"]}
    refuse(
        folder,
        "has the tensors A, B, the file A, B, delta_bias",
        sa.adapt(gpt2(), sa.LoRA(rank=3, alpha=8), **same),
    )
    folder = folder_of(**ATTENTION)
    target = ATTENTION["target_modules"]
    right = sa.LoRA(rank=4, alpha=10)
    refuse(folder, r"has LoRA\(rank=5", sa.adapt(llama(), sa.LoRA(rank=5, alpha=10), target))
    refuse(folder, r"down_proj is not adapted", sa.adapt(llama(), right, target[:2]))
    refuse(
        folder,
        "the file has no model.layers.0.mlp.up_proj",
        sa.adapt(llama(), right, [*target, "up_proj"]),
    )
    model = sa.adapt(llama(), right, target)
    with sa.merged(model):
        refuse(folder, "is merged: unmerge first", model, RuntimeError)
    model = llama().to("meta")
    with pytest.raises(RuntimeError, match="is on the meta device: load the base weights first"):
        load_peft(model, folder)
    assert not find_adapted(model)


def test_what_is_ignored_is_said_once(folder_of):
    folder = folder_of(**ATTENTION, lora_dropout=0.1)
    rewrite(folder, {"shiny": 1, "dull": None})
    model = llama()
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is not applied.*ignored: shiny") as said:
        load_peft(model, folder)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():  # as an error, before anything changes
        warnings.simplefilter("error")
        refuse(folder, "lora_dropout", error=UserWarning)


# -- refusals: export ------------------------------------------------------------------------------


def refuse_export(model, path, words, error=ValueError, export=export_peft, **options):
    before, there = state(model), sorted(os.listdir(path.parent))
    with pytest.raises(error, match=words):
        export(model, path, **options)
    assert_untouched(model, before)
    assert sorted(os.listdir(path.parent)) == there


def test_what_a_folder_cannot_hold_is_refused(tmp_path):
    out = tmp_path / "out"
    both = [(sa.LoRA(rank=2), ["q_proj"]), (sa.DoRA(rank=2), ["v_proj"])]
    refuse_export(adapted(llama, both), out, "q_proj has a LoRA and .*v_proj a DoRA.*svd_rank")
    quanta = adapted(llama, [(sa.QuanTA(), ["q_proj"])])
    refuse_export(quanta, out, "has a QuanTA.*use export_merged, or give svd_rank")
    refuse_export(quanta, out, "svd_rank must be a positive integer, got 0", svd_rank=0)
    dora = adapted(llama, [(sa.DoRA(rank=2), ["q_proj"])])
    refuse_export(dora, out, "has a DoRA, which vLLM does not load", serve_safe=True)
    table = adapted(llama, [(sa.LoRA(rank=2), ["embed_tokens"])])
    refuse_export(table, out, r"embed_tokens \(Embedding\): vLLM loads", serve_safe=True)
    picture = adapted(conv, [(sa.LoRA(rank=2), ["conv"])])
    refuse_export(picture, out, r"conv \(Conv2d\): vLLM loads", serve_safe=True)
    for options in ({"groups": 3}, {"dilation": 2}, {"padding_mode": "reflect"}):
        picture = sa.adapt(conv(**options), sa.LoRA(rank=3), "conv")
        refuse_export(picture, out, f"conv has {next(iter(options))}=.*use export_merged")
    refuse_export(llama(), out, "no adapted layer")
    alone = sa.adapt(nn.Linear(4, 4), sa.LoRA(rank=1))
    refuse_export(alone, out, "this model is itself the layer")
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match="is on the meta device"):
            export(adapted(llama, both[:1]).to("meta"), out)
    lora = adapted(llama, both[:1])
    with torch.no_grad():
        lora.model.layers[0].self_attn.q_proj.A[0, 0] = torch.inf
    refuse_export(lora, out, r"q_proj.A is not finite: not exported")
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    with torch.no_grad():
        [gate.fill_(1e30) for gate in sa.adapter_parameters(quanta)]
    refuse_export(quanta, out, "q_proj: its update is not finite: not exported", svd_rank=2)
    zero = sa.adapt(base, sa.DoRA(rank=2), "q_proj")
    refuse_export(zero, out, r"row 3 of W \+ sBA is zero \(1 such rows\), where PEFT's DoRA")


def test_biases_are_exported_where_peft_has_room(folder_of, tmp_path):
    out = tmp_path / "out"
    no_bias = load_peft(llama(), folder_of(**ATTENTION, lora_bias=True))
    refuse_export(no_bias, out, "has a trained bias, and vLLM loads A and B alone", serve_safe=True)
    sa.adapt(no_bias, sa.LoRA(rank=2), "embed_tokens")
    refuse_export(no_bias, out, "has a delta_bias and no bias: PEFT's lora_bias")
    with_bias = load_peft(gpt2(), folder_of(gpt2, **GPT2, lora_bias=True))
    sa.adapt(with_bias, sa.LoRA(rank=2), "wte")
    export_peft(with_bias, out)
    assert read(out)[0]["bias"] == "lora_only"
    assert_same(with_bias, reopen(gpt2(), out))


def test_folders_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = adapted(llama, [(sa.LoRA(rank=2), ["q_proj"])])
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError):
        export_peft(model, tmp_path / "no" / "out")
    out.mkdir()
    export_peft(model, out)  # an empty folder
    old = {name: (out / name).read_bytes() for name in os.listdir(out)}
    randomise(sa.adapter_parameters(model))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            refuse_export(model, out, "No space", OSError)
    moved = os.rename

    def second_fails(source, target, calls=[]):  # noqa: B006
        calls.append(source)
        if len(calls) == 3:  # the old folder is aside by then
            full()
        moved(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        refuse_export(model, out, "No space", OSError)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == old
    export_peft(model, out)
    assert (out / "adapter_model.safetensors").read_bytes() != old["adapter_model.safetensors"]
    (out / "notes.txt").write_text("mine")
    refuse_export(
        model, out, "also holds notes.txt, which a new export would delete", FileExistsError
    )
    (tmp_path / "file").write_text("mine")
    refuse_export(model, tmp_path / "file", "is a file: give the name of a folder", FileExistsError)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_peft(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").is_dir()


# -- merged ----------------------------------------------------------------------------------------


def from_folder(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", ["DoRA", "embedding and head", "Conv1D, DoRA"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_transformers_loads_a_merged_checkpoint(name, max_shard_size, tmp_path):
    build, layers = EXPORTS[name]
    model = adapted(build, layers)
    before, config = state(model), model.config.to_dict()
    kept = export_merged(model, tmp_path / "m", max_shard_size=max_shard_size)
    assert_untouched(model, before)
    assert model.config.to_dict() == config
    assert kept == pytest.approx(dict.fromkeys(find_adapted(model), 1.0), abs=1e-4)
    files = os.listdir(tmp_path / "m")
    assert ("model.safetensors.index.json" in files) == (max_shard_size == "20KB")
    loaded = from_folder(tmp_path / "m")
    assert loaded.state_dict().keys() == build().state_dict().keys()
    given = {"input_ids": torch.arange(12).reshape(2, 6)}
    torch.testing.assert_close(outputs(loaded, given), outputs(model, given), **CLOSE)
    if len(files) > 3:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_parameters"] == build().num_parameters()
    with sa.merged(model) if name != "Conv1D, DoRA" else sa.disabled(model):
        export_merged(model, tmp_path / "m", max_shard_size="5GB")  # over it, and the same
    again = from_folder(tmp_path / "m").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_tied_head_is_written_apart(target, dtype, tmp_path):
    model = llama(tie=True)
    sa.adapt(model, sa.LoRA(rank=2), [*target, "q_proj"])
    randomise(sa.adapter_parameters(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    export_merged(model, tmp_path / "m", dtype=dtype)
    assert model.config.tie_word_embeddings is True
    loaded = from_folder(tmp_path / "m", dtype=torch.float32)
    assert loaded.config.tie_word_embeddings is False
    given = {"input_ids": torch.arange(12).reshape(2, 6)}
    torch.testing.assert_close(outputs(loaded, given), outputs(model, given), **CLOSE)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tie_that_nothing_breaks_stays(dtype, tmp_path):
    model = adapted(lambda: llama(tie=True), [(sa.LoRA(rank=2, alpha=50), ["q_proj"])])
    export_merged(model, tmp_path / "m", dtype=dtype)
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {t.dtype for t in tensors.values()} == {dtype or torch.float32}
    loaded = from_folder(tmp_path / "m")
    assert loaded.dtype == (dtype or torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_plain_module_is_written_under_its_own_keys(net, ids, tmp_path, train_a_little):
    base = copy.deepcopy(net)
    sa.adapt(sa.adapt(net, sa.QuanTA(), "attn"), sa.DoRA(rank=2), "up")
    train_a_little(net)
    export_merged(torch.compile(net, backend="eager"), tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    base.load_state_dict(tensors)
    torch.testing.assert_close(base(ids), net(ids), **CLOSE)
    export_merged(net, tmp_path / "m", max_shard_size=9000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert not (tmp_path / "m" / "model.safetensors").exists()
    shards = {}
    for file in sorted({*index["weight_map"].values()}):
        part = safetensors.torch.load_file(tmp_path / "m" / file)
        assert all(index["weight_map"][key] == file for key in part)
        sizes = [t.numel() * t.itemsize for t in part.values()]
        assert sum(sizes) <= 9000 or len(sizes) == 1
        shards |= part
    assert shards.keys() == tensors.keys()
    assert all(torch.equal(shards[key], tensor) for key, tensor in tensors.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in shards.values())
    hub = pytest.importorskip("huggingface_hub")
    with torch.no_grad():
        [p.zero_() for p in base.parameters()]
    hub.load_torch_model(base, tmp_path / "m")
    torch.testing.assert_close(base(ids), net(ids), **CLOSE)


def test_a_layer_under_two_names_is_merged_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)

    model = sa.adapt(Twice(), sa.LoRA(rank=1), "a")
    randomise(sa.adapter_parameters(model))
    export_merged(model, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert tensors.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert torch.equal(tensors["a.weight"], model.a.adapted_weight())
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])


def test_biases_are_merged(folder_of, tmp_path):
    model = load_peft(gpt2(), folder_of(gpt2, **GPT2, lora_bias=True))
    export_merged(model, tmp_path / "m")
    given = {"input_ids": torch.arange(12).reshape(2, 6)}
    loaded = from_folder(tmp_path / "m")
    torch.testing.assert_close(outputs(loaded, given), outputs(model, given), **CLOSE)
    no_bias = load_peft(llama(), folder_of(**ATTENTION, lora_bias=True))
    words = "has a delta_bias and no bias to add it to"
    refuse_export(no_bias, tmp_path / "n", words, export=export_merged)


def test_what_rounding_loses_is_said(tmp_path):
    model = llama().bfloat16()
    sa.adapt(model, sa.LoRA(rank=2, alpha=0.1), "q_proj")
    randomise(sa.adapter_parameters(model), 1e-3)
    words = "q_proj: rounding to torch.bfloat16 leaves [0-9]+% of its update; nothing was exported"
    refuse_export(model, tmp_path / "m", words, export=export_merged)
    with pytest.warns(UserWarning, match="rounding to torch.bfloat16 loses more than 1 %") as said:
        kept = export_merged(model, tmp_path / "m", force=True)
    assert len(said) == 1 and said[0].filename == __file__
    for name, layer in find_adapted(model).items():
        W = layer.weight.double()
        delta = layer.delta_weight().double()
        rounded = (W + delta).bfloat16().double() - W
        share = (rounded * delta).sum() / (delta * delta).sum()
        assert kept[name] == pytest.approx(share.item(), abs=1e-3) and kept[name] < 0.99
    kept = export_merged(model, tmp_path / "m", dtype=torch.float32)
    assert min(kept.values()) > 0.999
    assert from_folder(tmp_path / "m").dtype == torch.float32


def test_what_cannot_be_merged_is_refused(net, tmp_path):
    out = tmp_path / "m"
    refuse_export(llama(), out, "no adapted layer", export=export_merged)
    model = adapted(llama, [(sa.LoRA(rank=2), ["q_proj"])])
    refuse_export(model, out, "dtype must be a floating", export=export_merged, dtype=torch.int8)
    for size in ("big", 0, "-1GB", True):
        words = "max_shard_size must be"
        refuse_export(model, out, words, export=export_merged, max_shard_size=size)
    q_proj = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        q_proj.B[0, 0] = 1e6
        q_proj.A[0, 0] = 1e6
    words = "1.self_attn.q_proj: the merged weight is not finite in torch.float16"
    refuse_export(model, out, words, export=export_merged, dtype=torch.float16)
    with torch.no_grad():
        q_proj.B[0, 0] = q_proj.A[0, 0] = 0.0
        model.model.norm.weight[0] = 1e6
    words = "model.norm.weight is not finite in torch.float16"
    refuse_export(model, out, words, export=export_merged, dtype=torch.float16)
    with torch.no_grad():
        q_proj.B[0, 0] = torch.nan
    refuse_export(model, out, "q_proj.B is not finite", export=export_merged)
    net.lm_head.weight = net.embed.weight
    sa.adapt(net, sa.LoRA(rank=2), ["lm_head", "attn"])
    words = "embed.weight is the weight of an adapted layer too, and would lose its tie"
    refuse_export(net, out, words, export=export_merged)
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    refuse_export(model, out, "also holds tokenizer.json", FileExistsError, export_merged)
