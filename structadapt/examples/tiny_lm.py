"""A 0.4 M-parameter character model and a task to train it on: three-digit addition.

    prompt "012+345="   answer "7530"   the sum, least significant digit first, then "$"

The model calls like a transformers causal LM, cache included. Held-out problems, one in eleven,
are in neither the cold start nor the GRPO prompts.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ALPHABET = "0123456789+=$"
EOS = ALPHABET.index("$")
VOCAB = 16
PROMPT_TOKENS, ANSWER_TOKENS = 8, 5

Cache = list[tuple[Tensor, Tensor]]


class CharTokenizer:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        return [ALPHABET.index(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(ALPHABET[i] if i < len(ALPHABET) else "?" for i in ids)


class TinyLM(nn.Module):
    """A pre-norm decoder: RMSNorm, learned positions, ReLU MLP, no biases, untied head."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                small = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if small else 0.02)

    def forward(
        self,
        input_ids: Tensor,  # (N, L): the whole sequence, or what the cache does not hold yet
        attention_mask: Tensor | None = None,  # (N, S) of the whole sequence, 1 for a token
        position_ids: Tensor | None = None,  # (N, L)
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Logits (N, L, V); with use_cache, also the keys and values of every layer."""
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        L, S = input_ids.shape[1], past + input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, S, device=input_ids.device)[None]
        visible = torch.ones(L, S, dtype=torch.bool, device=input_ids.device).tril(past)
        if attention_mask is not None:  # padding sees itself, or its softmax would be 0 / 0
            self_only = torch.eye(S, dtype=torch.bool, device=input_ids.device)[past:]
            visible = (visible & attention_mask[:, None, None].bool()) | self_only
        x = self.tokens(input_ids) + self.positions(position_ids)
        cache: Cache = []
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, visible, past_key_values[i] if past_key_values else None)
            cache.append(keys_values)
        logits = self.lm_head(self.norm(x))
        return (logits, cache) if use_cache else logits


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = self.norm1(x)
        q, k, v = (
            rearrange(linear(h), "n l (h d) -> n h l d", h=self.heads)
            for linear in (self.q, self.k, self.v)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.o(rearrange(attended, "n h l d -> n l (h d)"))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return x, (k, v)


# -- the task --------------------------------------------------------------------------------------


def problem(a: int, b: int) -> dict[str, str]:
    """A record with prompt and answer."""
    return {"prompt": f"{a:03}+{b:03}=", "answer": f"{a + b:04}"[::-1]}


def is_held_out(a: int, b: int) -> bool:
    """One pair of operands in eleven, whatever their order."""
    return (min(a, b) + 2 * max(a, b)) % 11 == 0


def problems(rng: random.Random, held_out: bool, curriculum: bool = False) -> Iterator[dict]:
    """Random problems for ever, all held out or none. With `curriculum`, operands of one, two or
    three digits are equally frequent; without, operands are uniform in 0..999."""
    while True:
        limits = [10 ** rng.randint(1, 3) if curriculum else 1000 for _ in range(2)]
        a, b = (rng.randrange(limit) for limit in limits)
        if is_held_out(a, b) == held_out:
            yield problem(a, b)


def lessons(seed: int) -> Iterator[dict]:
    """The problems of the cold start of a seed."""
    return problems(random.Random(f"cold start {seed}"), held_out=False, curriculum=True)


def cold_start(
    model: TinyLM,
    accuracy: Callable[[], float],
    target: float,
    source: Iterator[dict[str, str]],
    max_steps: int = 400,
) -> Iterator[tuple[int, float, float | None]]:
    """Supervised steps on problems of `source`, whose prompts are PROMPT_TOKENS long and whose
    answers are of one length, until `accuracy()` reaches `target`, looked at every five steps.

    Yields (step, loss, accuracy or None). The model then solves some problems, so that rewards
    differ within groups, and GRPO has something to go on.
    """
    tokenizer = CharTokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, total_iters=50)
    for step in range(1, max_steps + 1):
        batch = [p["prompt"] + p["answer"] + "$" for p in islice(source, 128)]
        ids = torch.tensor([tokenizer.encode(text) for text in batch])
        logits = model(ids[:, :-1])
        assert isinstance(logits, Tensor)
        answer = logits[:, PROMPT_TOKENS - 1 :]
        loss = F.cross_entropy(answer.flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        reached = accuracy() if step % 5 == 0 else None
        yield step, loss.item(), reached
        if reached is not None and reached >= target:
            return
