"""Sampling: caches, masks, padding, and the two ways to a log-probability."""

import inspect
import math
import random
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import structadapt as sa
from structadapt import ops
from structadapt.examples import tiny_lm
from structadapt.grpo import network
from structadapt.grpo.config import Config
from structadapt.grpo.noise import uniforms
from structadapt.grpo.output_head import find_head
from structadapt.grpo.rollout import Rollout, _draw, evaluating, generate, logprobs

EOS = 3
PROMPTS = [[5, 6, 7], [8], [9, 4, 5, 6, 7, 8], [5, 6, 7], [5, 6, 7], [EOS, 5], [5]]


class Plain(nn.Module):
    """Causal without attention: a decaying sum of what came before, no cache."""

    def __init__(self, vocab: int = 12) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, 16), nn.Linear(16, vocab)

    def forward(self, ids, mask, position_ids):
        x = self.embed(ids) * mask[..., None]
        x = torch.stack([x[:, : t + 1].sum(1) for t in range(ids.shape[1])], 1)
        return self.head(torch.sin(x + position_ids[..., None]))


class NoMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, ids):
        ones = torch.ones_like(ids)
        return self.inner(ids, ones, ones.cumsum(1) - 1)


def llama():
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=EOS, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=12, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=EOS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Tiny(tiny_lm.TinyLM):
    def __init__(self) -> None:
        super().__init__(width=16, layers=2, heads=2)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5)


MODELS = {"tiny": Tiny, "llama": llama, "gpt2": gpt2, "plain": Plain}
CACHED = ["tiny", "llama", "gpt2"]


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def rollout(model, prompts=PROMPTS, **options):
    defaults = {"eos_token_ids": [EOS], "max_new_tokens": 8, "pad_token_id": EOS}
    options = defaults | options
    noise = torch.Generator().manual_seed(1)
    options.setdefault(
        "noise",
        torch.rand(len(prompts), options["max_new_tokens"], generator=noise)
        if options["max_new_tokens"] > 0
        else None,
    )
    return generate(model, prompts, **options)


def test_sampled_and_recomputed_logprobs_agree(model):
    """With a cache and without, left-padded, at the same temperature on both sides."""
    for temperature in (1.0, 0.7):
        r = rollout(model, temperature=temperature)
        logp, entropy = logprobs(model, r, temperature)
        on = r.mask.bool()
        torch.testing.assert_close(logp[on], r.logp[on], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[on], r.entropy[on], rtol=1e-4, atol=1e-5)
        assert logp.dtype == torch.float32
        assert not torch.allclose(logprobs(model, r, 2.0)[0][on], r.logp[on], atol=1e-2)


def test_padding_changes_nothing(model):
    """Each sequence by itself, unpadded, has the log-probabilities it has in the batch."""
    r = rollout(model)
    logp, _ = logprobs(model, r)
    for i, prompt in enumerate(PROMPTS):
        n = int(r.mask[i].sum())
        new = r.completion[i, :n].tolist()
        ids = torch.tensor([prompt + new])
        ones = torch.ones_like(ids)
        out = model(ids, ones, ones.cumsum(1) - 1) if isinstance(model, Plain) else model(ids)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        alone = logits[0, len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(n), new]
        torch.testing.assert_close(logp[i, :n], alone, rtol=1e-4, atol=1e-5)


def test_the_end_counts_once_though_it_is_the_pad_token(model):
    r = rollout(model, prompts=PROMPTS * 8, max_new_tokens=6)
    seen = set()
    for tokens, mask, cut in zip(r.completion.tolist(), r.mask.tolist(), r.truncated, strict=True):
        ended = EOS in tokens[: sum(mask)]
        length = tokens.index(EOS) + 1 if ended else len(tokens)
        assert mask == [1] * length + [0] * (len(tokens) - length)
        assert bool(cut) is not ended
        seen.add(ended)
    assert seen == {True, False}, "the test needs both kinds"
    assert not r.logp[r.mask == 0].any()
    kept = r.completions([EOS])
    assert all(EOS not in ids for ids in kept)
    lengths = r.mask.sum(1) - (~r.truncated).long()
    assert [len(ids) for ids in kept] == lengths.tolist()


def test_prompts_that_hold_the_pad_token_are_not_masked(model):
    r = rollout(model, prompts=[[EOS, 5, EOS], [EOS]])
    assert r.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", CACHED)
def test_sharing_prompts_gives_the_same_samples_and_gradients(name):
    model = build(name)
    prompts = [p for p in PROMPTS for _ in range(3)]
    apart, shared = rollout(model, prompts), rollout(model, prompts, share_prompts=True)
    for field in ("prompt", "prompt_mask", "completion", "mask", "truncated"):
        assert torch.equal(getattr(apart, field), getattr(shared, field))
    torch.testing.assert_close(apart.logp, shared.logp, rtol=1e-4, atol=1e-5)
    gradients = []
    for share in (False, True):
        for part in (apart, apart[4:8], apart[0:1]):
            logp, _ = logprobs(model, part, 1.0, share)
            loss = (logp * part.mask).sum()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for left, right in zip(gradients[:3], gradients[3:], strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("head", ["auto", "logits"])
def test_sequences_of_like_lengths_run_together(name, head, monkeypatch):
    """In four groups or in one; also a single sequence, and one that counts for nothing."""
    model, sizes = build(name), []
    r = rollout(model, [p for p in PROMPTS for _ in range(3)], max_new_tokens=9, eos_token_ids=[])
    lengths = torch.arange(len(r)) % 9 + 1
    r = replace(r, mask=(torch.arange(9) < lengths[:, None]).long())
    extend = network.Network.extend

    def spy(self, ids, mask):
        sizes.append(tuple(ids.shape))
        return extend(self, ids, mask)

    monkeypatch.setattr(network.Network, "extend", spy)
    blank = replace(r[:5], mask=r[:5].mask.clone())
    blank.mask[1] = 0
    for part in (r, r[2:5], r[:1], blank):
        found = []
        for small in (0, 10**9):
            monkeypatch.setattr(network, "SMALL", small)
            logp, entropy = logprobs(model, part, 1.0, True, head)
            loss = (logp * torch.linspace(1, 2, part.mask.numel()).view_as(logp)).sum()
            found.append((logp, entropy, *torch.autograd.grad(loss, list(model.parameters()))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    apart = [n * length for n, length in sizes[:4]]
    assert sum(apart) < sizes[4][0] * sizes[4][1], "less padding runs"


def test_a_cache_is_used(model, monkeypatch):
    lengths = []
    forward = type(model).forward

    def spy(self, ids=None, *args, **kwargs):
        lengths.append((kwargs.get("input_ids") if ids is None else ids).shape[1])
        return forward(self, ids, *args, **kwargs)

    spy.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", spy)
    rollout(model, prompts=[[5, 6]], max_new_tokens=4, eos_token_ids=[])
    assert lengths == ([2, 3, 4, 5] if isinstance(model, Plain) else [2, 1, 1, 1])


def test_greedy_and_seeds(model):
    greedy = [rollout(model, temperature=0, noise=None) for _ in range(2)]
    assert torch.equal(greedy[0].completion, greedy[1].completion)
    same = [rollout(model).completion for _ in range(2)]
    assert torch.equal(*same)
    state = torch.get_rng_state()
    rollout(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("share", [False, True])
def test_a_sequence_does_not_depend_on_what_runs_beside_it(model, slots, share):
    """Sequences of all lengths that leave early, and others that take their places."""
    if share and isinstance(model, Plain):
        return
    prompts = [p for p in PROMPTS for _ in range(2)]
    expected = rollout(model, prompts, share_prompts=share)
    found = rollout(model, prompts, slots=slots, share_prompts=share)
    for field in ("prompt", "prompt_mask", "completion", "mask", "truncated"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-4, atol=1e-5)
    assert len({int(n) for n in expected.mask.sum(1)}) > 2


def test_finished_sequences_leave_and_others_take_their_places(monkeypatch):
    model, sizes = build("tiny"), []
    forward = Tiny.forward

    def spy(self, input_ids, *args, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    spy.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(Tiny, "forward", spy)
    r = rollout(model, PROMPTS * 8, max_new_tokens=20, slots=8)
    tokens, read = int(r.mask.sum()), sum(n for n, length in sizes if length == 1)
    assert read == tokens - len(r), "the last token of a sequence is not read, and none after it"
    assert max(n for n, _ in sizes) == 8
    held = sum(n for n, length in sizes if length == 1) / sum(1 for _, n in sizes if n == 1)
    assert held > 4, "the batch stays full"


def test_a_sliding_window_is_filled_again_when_it_is_empty():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=EOS, initializer_range=0.5, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    one = [p for p in PROMPTS if len(p) == 1] * 3
    assert torch.equal(rollout(model, one).completion, rollout(model, one, slots=4).completion)


def test_logits_that_are_not_finite_are_named():
    model = build("plain")
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="logits are not finite for prompt 1"):
            rollout(model, [[5], [7]], temperature=temperature)


def test_noise_has_a_row_for_each_key():
    keys = [(s, t, p, i) for s in range(3) for t in range(3) for p in range(3) for i in range(3)]
    u = uniforms(keys, 500)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert torch.equal(u[5:6, :20], uniforms(keys[5:6], 20))
    assert len(u.unique()) == u.numel()
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    correlation = torch.corrcoef(u)
    assert (correlation - torch.eye(len(u))).abs().max() < 5.5 / 500**0.5


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf]).repeat(4, 1)
    noise = torch.tensor([0.0, 1 - 2**-24, 1.0, 0.268941])
    token, broken = _draw(logits, 1.0, noise)
    assert not broken.any()
    assert token.tolist() == [0, 2, 2, token[3].item()] and token[3] in (0, 2)


def test_samples_follow_the_distribution_at_the_temperature():
    model = build("plain")
    r = rollout(model, [[5, 6]] * 20_000, max_new_tokens=1, temperature=0.5)
    ids = torch.tensor([[5, 6]])
    logits = model(ids, torch.ones_like(ids), torch.arange(2)[None])[0, -1]
    expected = (logits / 0.5).softmax(-1)
    frequency = torch.bincount(r.completion[:, 0], minlength=12) / len(r)
    assert (frequency - expected).abs().max() < 4 * (0.25 / len(r)) ** 0.5


def test_bf16_logits_meet_an_fp32_softmax():
    model = build("llama").bfloat16()
    r = rollout(model)
    logp, _ = logprobs(model, r)
    assert logp.dtype == r.logp.dtype == torch.float32
    assert torch.isfinite(logp).all()


def test_a_model_without_a_mask():
    torch.manual_seed(0)
    model = NoMask()
    r = rollout(model, prompts=[[5, 6], [7, 8]])
    logp, _ = logprobs(model, r)
    torch.testing.assert_close(logp[r.mask.bool()], r.logp[r.mask.bool()])
    with pytest.raises(ValueError, match=r"NoMask.forward takes no mask: pass prompts of one len"):
        rollout(model)


class Renamed(nn.Module):
    """Every signature that a causal model may reasonably have; the same function underneath."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def run(self, ids, mask=None, positions=None):
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0) if positions is None else positions
        return self.inner(ids, mask, positions)


class HF(Renamed):
    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None
        return self.run(input_ids, attention_mask)


class ByName(Renamed):
    def forward(self, ids, *, positions=None, mask=None):
        return self.run(ids, mask, positions)


class ByPlace(Renamed):
    def forward(self, x, m, p):
        return self.run(x, m, p)


class Keywords(Renamed):
    def forward(self, input_ids, **kw):
        return self.run(input_ids, kw["attention_mask"], kw["position_ids"])


class NanoGPT(Renamed):
    def forward(self, idx, targets=None):
        assert targets is None
        return self.run(idx)


class Wrapper(nn.Module):
    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("kind", [HF, ByName, ByPlace, Keywords, NanoGPT])
def test_arguments_are_bound_by_what_they_mean(kind):
    torch.manual_seed(0)
    model = kind()
    prompts = [[5, 6]] * 3 if kind is NanoGPT else PROMPTS
    expected = rollout(model.inner, prompts)
    for wrapped in (model, Wrapper(model), torch.compile(model, backend="eager")):
        assert torch.equal(rollout(wrapped, prompts).completion, expected.completion)
    if kind is NanoGPT:
        with pytest.raises(ValueError, match=r"NanoGPT.forward takes no mask"):
            rollout(model, PROMPTS)


def test_a_wrapped_transformers_model_keeps_its_cache():
    model = build("gpt2")
    expected = rollout(model)
    for wrapped in (Wrapper(model), torch.compile(model, backend="eager")):
        assert torch.equal(rollout(wrapped, share_prompts=True).completion, expected.completion)


def test_a_signature_that_is_not_understood():
    class Odd(Renamed):
        def forward(self, ids, mask, positions, segment):
            raise AssertionError

    with pytest.raises(
        ValueError, match=r"Odd.forward\(ids, mask, positions, segment\) is not und"
    ):
        rollout(Odd())


def test_logprobs_and_entropy_in_closed_form():
    logits = torch.tensor([[[1.0, 2.0, 4.0], [0.0, -torch.inf, 0.0]]])
    for temperature in (1.0, 0.7):
        logp, entropy = ops.token_logprobs(logits, torch.tensor([[2, 0]]), temperature)
        p = (logits.double()[0, 0] / temperature).exp()
        p = p / p.sum()
        expected = torch.tensor([[p[2].log(), -math.log(2)]])
        torch.testing.assert_close(logp, expected.float())
        expected = torch.tensor([[-(p * p.log()).sum(), math.log(2)]])
        torch.testing.assert_close(entropy, expected.float())
    rough = ops.token_logprobs(logits.bfloat16(), torch.tensor([[2, 0]]), 0.7)[0]
    torch.testing.assert_close(rough, logp, rtol=1e-6, atol=1e-6)


def test_after_the_end_there_is_padding_and_nothing_else(model):
    r = rollout(model, prompts=PROMPTS * 8, max_new_tokens=6, pad_token_id=11)
    off = r.mask == 0
    assert off.any() and (r.completion[off] == 11).all()
    assert not r.logp[off].any() and not r.entropy[off].any()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"at least one token, got lengths \[1, 0\]"):
        rollout(build("plain"), [[1], []])
    with pytest.raises(ValueError, match=r"at least one token, got lengths \[\]"):
        rollout(build("plain"), [])
    with pytest.raises(ValueError, match="share_prompts needs a cache, and Plain.forward has none"):
        rollout(build("plain"), share_prompts=True)
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"slots": 0}):
        with pytest.raises(ValueError, match="max_new_tokens and slots must be at least 1"):
            rollout(build("plain"), **options)


def test_slices_drop_columns_that_no_row_uses():
    r = rollout(build("plain"), PROMPTS * 4)
    short = int(r.mask.sum(1).argmin())
    part = r[short : short + 1]
    assert part.completion.shape[1] == part.mask.sum() < r.completion.shape[1]
    assert isinstance(part, Rollout) and len(part) == 1
    assert part.truncated.item() == r.truncated[short].item()


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()), nn.Dropout())
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == modes


def test_adapted_models_roll_out_the_same_merged_or_not():
    model = sa.adapt(build("llama"), sa.DoRA(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    apart = rollout(model)
    with sa.merged(model):
        merged = rollout(model)
    assert torch.equal(apart.completion, merged.completion)
    torch.testing.assert_close(apart.logp, merged.logp, rtol=1e-3, atol=1e-4)


# -- the example's task ----------------------------------------------------------------------------


def test_held_out_problems_are_never_trained_on():
    for curriculum in (True, False):
        seen = islice(tiny_lm.problems(random.Random(0), False, curriculum), 3000)
        held = islice(tiny_lm.problems(random.Random(0), True, curriculum), 300)
        operands = [{frozenset(p["prompt"][:-1].split("+")) for p in ps} for ps in (seen, held)]
        assert not operands[0] & operands[1], "neither a + b nor b + a"
    share = sum(tiny_lm.is_held_out(a, b) for a in range(1000) for b in range(0, 1000, 7)) / 143_000
    assert 0.08 < share < 0.1


def test_problems_are_right():
    assert tiny_lm.problem(7, 58) == {"prompt": "007+058=", "answer": "5600"}
    tokenizer = tiny_lm.CharTokenizer()
    assert tokenizer.decode(tokenizer.encode("012+345=7530$")) == "012+345=7530$"
    assert tokenizer.decode([15]) == "?"


# -- without the logits ----------------------------------------------------------------------------


class Plus(nn.Module):
    """Hidden states and then `lm_head`, and what a model may do around it."""

    def __init__(self, vocab: int = 12) -> None:
        super().__init__()
        self.body = Plain(vocab)
        self.body.head = nn.Identity()
        self.lm_head = nn.Linear(16, vocab)
        nn.init.normal_(self.lm_head.weight)

    def forward(self, ids, mask, position_ids):
        return self.after(self.lm_head(self.body(ids, mask, position_ids)))

    def after(self, logits):
        return logits


def variant(name, after):
    return type(name, (Plus,), {"after": after})


def in_place(self, logits):
    logits[..., 0] -= 1.0
    return logits


def masked(self, logits):
    return logits.masked_fill(torch.arange(12) == 4, -torch.inf)


class Twice(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        self.lm_head(x)
        return self.lm_head(x + 1)


class Unused(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        return nn.functional.linear(x, self.lm_head.weight)


class Flat(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        return self.lm_head(x.flatten(0, 1)).view(*x.shape[:2], -1)


class Checkpointed(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        return checkpoint(self.lm_head, x, use_reentrant=True)


class Overwritten(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids) * 1.0
        logits = self.lm_head(x)
        with torch.no_grad():
            x.zero_()
        return logits


class Float(Plus):
    def after(self, logits):
        return logits.float()


class OtherWeight(Plus):
    def forward(self, ids, mask, position_ids):
        weight = {"weight": self.lm_head.weight * 0.5}
        return torch.func.functional_call(self.lm_head, weight, self.body(ids, mask, position_ids))


class WithoutGrad(Plus):
    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        with torch.no_grad():
            return self.lm_head(x)


class Auxiliary(Plus):
    def after(self, logits):
        self.z_loss = logits.logsumexp(-1).square().mean()
        return logits


OTHERWISE = {
    "another weight": OtherWeight,
    "without grad": WithoutGrad,
    "a cap that zeros never meet": variant(
        "CappedIfLarge", lambda self, z: 0.1 * z if z.abs().max() > 0.01 else z
    ),
    "a loss of its own": Auxiliary,
    "softcap": variant("Softcap", lambda self, z: 2 * torch.tanh(z / 2)),
    "scale": variant("Scale", lambda self, z: z * 0.3),
    "in place": variant("InPlace", in_place),
    "view in place": variant("ViewInPlace", lambda self, z: z.mul_(0.5)),
    "mask": variant("Masked", masked),
    "moved": variant("Moved", lambda self, z: z.roll(1, 1)),
    "flipped view": variant("Flipped", lambda self, z: z.transpose(0, 1).transpose(0, 1)),
    "twice": Twice,
    "unused": Unused,
    "flat": Flat,
    "checkpointed": Checkpointed,
}


@pytest.fixture
def calls(monkeypatch):
    """How often each way was taken."""
    counts = {"head_logprobs": 0, "token_logprobs": 0}

    def counted(name):
        original = getattr(ops, name)

        def call(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(ops, name, call)

    for name in counts:
        counted(name)
    return lambda: tuple(counts.values())


def both_ways(model, r, temperature=0.7, share=False):
    """(logp, entropy, gradients) by the head and by the logits."""
    found = []
    for head in ("auto", "logits"):
        logp, entropy = logprobs(model, r, temperature, share, head)
        loss = torch.where(r.mask.bool(), (logp + 0.1) ** 2, 0.0).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append((logp, entropy, *grads))
    return found


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", CACHED)
def test_without_the_logits_all_is_the_same(name, share, calls):
    """Values and gradients of every parameter, a tied head (gpt2) and an untied one that train."""
    model = build(name)
    prompts = [p for p in PROMPTS for _ in range(2)]
    r = rollout(model, prompts)
    before = calls()
    assert_same(*both_ways(model, r, share=share))
    assert calls() == (before[0] + 1, before[1] + 1)
    assert "forward" not in vars(model.get_output_embeddings() if name != "tiny" else model.lm_head)
    one = rollout(model, prompts, max_new_tokens=1)
    assert_same(*both_ways(model, one, share=share))
    with torch.no_grad():
        assert_same(logprobs(model, r), logprobs(model, r, head="logits"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_and_inference_mode(calls):
    model = build("llama").train()
    r = rollout(model)
    before = calls()
    model.gradient_checkpointing_enable()
    assert_same(*both_ways(model, r))
    with torch.inference_mode():
        logp, _ = logprobs(model, r)
    assert_same([logp], [logprobs(model, r)[0]])
    assert calls() == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("kind", [Plus, Float])
def test_a_frozen_head_and_a_bias(kind, calls):
    torch.manual_seed(0)
    model = kind()
    r = rollout(model)
    before = calls()
    for frozen in (False, True):
        model.lm_head.requires_grad_(not frozen)
        assert_same(*both_ways(model, r))
    assert calls() == (before[0] + 2, before[1] + 2)


def test_the_logits_are_never_made():
    """With 4000 tokens in the vocabulary nothing of their size is kept for the backward."""
    torch.manual_seed(0)
    model = Plus(vocab=4000)
    model.lm_head.requires_grad_(False)
    r = rollout(model, max_new_tokens=4)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: largest.append(t.numel()) or t, lambda t: t
    ):
        logprobs(model, r)
    weights = model.lm_head.weight.numel()
    assert all(n < 16 * 4000 // 4 or n == weights for n in largest)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", OTHERWISE)
def test_logits_that_are_not_what_the_head_gave_are_made(name, calls):
    """Found out in the first call, and remembered."""
    torch.manual_seed(0)
    model = OTHERWISE[name]()
    r = rollout(model)
    expected = r.logp[r.mask.bool()]
    before = calls()
    forward, runs = model.body.forward, []
    model.body.forward = lambda *args: runs.append(1) or forward(*args)
    for n in (2, 3):
        logp, _ = logprobs(model, r)
        assert len(runs) == n, "tried once without logits, and not again"
        torch.testing.assert_close(logp[r.mask.bool()], expected, rtol=1e-4, atol=1e-5)
        assert calls() == (before[0], before[1] + n - 1)
        assert "forward" not in vars(model.lm_head)


def test_the_second_try_drops_what_the_first_did():
    """In train mode, a probe that fails must not move the random numbers on."""
    torch.manual_seed(0)
    model = variant("Dropped", lambda self, z: F.dropout(z, 0.5, self.training))().train()
    body = model.body.forward
    model.body.forward = lambda *args: F.dropout(body(*args), 0.5, model.training)
    r = rollout(model)
    found = []
    for head in ("auto", "logits"):
        torch.manual_seed(3)
        found.append(logprobs(model, r, head=head)[0])
    torch.testing.assert_close(*found)


def test_another_thread_gets_its_logits():
    torch.manual_seed(0)
    model = Plus()
    r = rollout(model)
    expected = logprobs(model, r, head="logits")[0]
    body, other = model.body.forward, []

    def slow(*args):
        if threading.current_thread() is threading.main_thread():
            hidden = body(*args)
            thread = threading.Thread(
                target=lambda: other.append(logprobs(model, r, head="logits")[0])
            )
            thread.start()
            thread.join()
            return hidden
        return body(*args)

    model.body.forward = slow
    logp, _ = logprobs(model, r)
    torch.testing.assert_close(other[0], expected)
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-5)


def test_running_out_of_memory_is_not_the_models_fault():
    model = Plus()
    r = rollout(model)
    forward = model.body.forward

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    model.body.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        logprobs(model, r)
    model.body.forward = forward
    assert find_head(model) is not None and "forward" not in vars(model.lm_head)


def test_hidden_states_that_are_overwritten_later_are_not_taken(calls):
    torch.manual_seed(0)
    model = Overwritten()
    with torch.no_grad():
        r = rollout(model)
        logp, _ = logprobs(model, r)
    torch.testing.assert_close(logp[r.mask.bool()], r.logp[r.mask.bool()], rtol=1e-4, atol=1e-5)
    assert calls()[0] == 0


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def hooked_outside(model):
    model.register_forward_hook(lambda module, args, out: out * 2)


def replaced(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


def parametrized(model):
    class Double(nn.Module):
        def forward(self, W):
            return 2 * W

    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Double())


def subclass(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled


def tensor_subclass(model):
    class Odd(nn.Parameter):
        pass

    model.lm_head.weight.__class__ = Odd


def compiled_in_place(model):
    model.compile(backend="eager")


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def adapted_head(model):
    sa.adapt(model, sa.LoRA(rank=2), target="lm_head")
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(0.5)


CHANGES = [hooked, hooked_outside, replaced, parametrized, subclass, tensor_subclass,
           compiled_in_place, compiled_forward, adapted_head]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_head_that_is_more_than_a_linear_layer_is_run(change, calls):
    torch.manual_seed(0)
    model = Plus()
    change(model)
    with torch.no_grad():
        r = rollout(model)
        logp, _ = logprobs(model, r)
    torch.testing.assert_close(logp[r.mask.bool()], r.logp[r.mask.bool()], rtol=1e-4, atol=1e-5)
    assert calls()[0] == 0


def test_wrapped_models_make_their_logits(calls):
    torch.manual_seed(0)
    model = Plus()
    r = rollout(model)
    for wrapped in (Wrapper(model), torch.compile(model, backend="eager")):
        logprobs(wrapped, r)
    assert calls()[0] == 0
    logprobs(model, r)
    assert calls()[0] == 1, "and only they"


def test_a_model_that_fails_fails_as_ever_and_is_left_whole(calls):
    torch.manual_seed(0)
    model = Plus()
    r = rollout(model)

    def fail(*args):
        raise KeyError("broken")

    model.body.forward = fail
    with pytest.raises(KeyError, match="broken"):
        logprobs(model, r)
    assert "forward" not in vars(model.lm_head)
    del model.body.forward
    logprobs(model, r)
    assert calls()[0] == 1, "a failure of its own is not held against it"
    model.half()  # fp32 inputs to a half head: refused as ever
    model.body.float()
    with pytest.raises(RuntimeError, match="dtype"):
        logprobs(model, r)


class Half(Plus):
    """Its own autocast around the head, on or off."""

    on = True

    def forward(self, ids, mask, position_ids):
        x = self.body(ids, mask, position_ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.lm_head(x)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_that_of_the_head(inside, outside, calls):
    torch.manual_seed(0)
    model = Half()
    model.on = inside
    r = rollout(model)
    found = []
    for head in ("auto", "logits"):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            logp, entropy = logprobs(model, r, 0.7, False, head)
        grads = torch.autograd.grad(logp.sum(), list(model.parameters()))
        assert all(g.dtype == torch.float32 for g in grads)
        found.append((logp, entropy, *grads))
    for left, right in zip(*found, strict=True):
        difference = (left - right).norm() / right.norm()
        if inside:  # the logits are rounded to bf16, and here alone
            assert 1e-4 < difference < 2e-2
        else:
            assert difference < 1e-5
    assert calls()[0] == 1


def test_bf16_models_agree_to_the_rounding_of_their_logits():
    model = build("llama").bfloat16()
    r = rollout(model)
    found = both_ways(model, r)
    for a, b in zip(*(f[:2] for f in found), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=3e-2)
    wide = build("llama").bfloat16()
    wide.lm_head.float()
    with torch.no_grad():  # the head in fp32: what the logits would be without their rounding
        head = wide.lm_head
        head.forward = lambda x: nn.functional.linear(x.float(), head.weight)
        exact = logprobs(wide, r, 0.7, head="logits")
    torch.testing.assert_close(found[0][0], exact[0], rtol=1e-5, atol=1e-5)


def test_a_softcapped_transformers_model_keeps_its_cap(calls):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=EOS, initializer_range=0.5, final_logit_softcapping=1.0, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    r = rollout(model)
    logp, _ = logprobs(model, r)
    torch.testing.assert_close(logp[r.mask.bool()], r.logp[r.mask.bool()], rtol=1e-4, atol=1e-5)
    assert calls()[0] == 0
    model.config.final_logit_softcapping = None
    assert not torch.allclose(logprobs(model, r)[0], logp, atol=1e-2)


def test_the_option_is_checked():
    with pytest.raises(ValueError, match=r"head must be one of \('auto', 'logits'\), got 'both'"):
        Config(eos_token_id=EOS, head="both")
