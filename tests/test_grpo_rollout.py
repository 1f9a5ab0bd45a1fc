"""Sampling: caches, masks, padding, and the two ways to a log-probability."""

import inspect
import math
import random
from itertools import islice

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import structadapt as sa
from structadapt import ops
from structadapt.examples import tiny_lm
from structadapt.grpo.rollout import Rollout, evaluating, generate, logprobs

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
    options.setdefault("generator", torch.Generator().manual_seed(1))
    return generate(model, prompts, **(defaults | options))


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
    greedy = [rollout(model, temperature=0, generator=torch.Generator()) for _ in range(2)]
    assert torch.equal(greedy[0].completion, greedy[1].completion)
    same = [rollout(model).completion for _ in range(2)]
    assert torch.equal(*same)
    state = torch.get_rng_state()
    rollout(model)
    assert torch.equal(torch.get_rng_state(), state)


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
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1 and temperature"):
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
