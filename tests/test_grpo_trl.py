"""Loss and gradient are those of TRL's own GRPOTrainer on the same ragged, left-padded tensors."""

import importlib.metadata

import pytest
import torch
from datasets import Dataset
from test_integrations import reward, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import structadapt as sa
from structadapt.grpo.rollout import Rollout, logprobs

LONGEST, PAD = 7, 0

pytestmark = [  # TRL's own default sets it by the old name
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", params=[1.0, 0.7])
def trainer(request, tmp_path_factory):
    """At a temperature, which it has for life."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=PAD, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=8,
        num_generations=4, temperature=request.param, max_completion_length=LONGEST,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config).double(), reward_funcs=reward, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]), processing_class=tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def batch(trainer):
    """Eight ragged sequences of another policy than the model's; prompts padded on the left."""
    g = torch.Generator().manual_seed(1)
    prompts, lengths = (
        torch.tensor([3, 5, 1, 4, 2, 5, 5, 3]),
        torch.tensor([7, 2, 5, 1, 3, 6, 4, 2]),
    )
    prompt_mask = (torch.arange(5) >= 5 - prompts[:, None]).long()
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    prompt = torch.randint(2, 32, (8, 5), generator=g).masked_fill(prompt_mask == 0, PAD)
    completion = torch.randint(2, 32, (8, LONGEST), generator=g).masked_fill(mask == 0, PAD)
    blank = torch.zeros(8, LONGEST)
    part = Rollout(prompt, prompt_mask, completion, mask, blank, blank, torch.ones(8).bool())
    with torch.no_grad():
        now = logprobs(trainer.model, part)[0]
    old = now + 0.3 * torch.randn(8, LONGEST, generator=g)
    ref = now + 0.3 * torch.randn(8, LONGEST, generator=g)
    return part, old, ref, torch.randn(8, generator=g)


def theirs(trainer, batch, **settings):
    part, old, ref, A = batch
    for name, value in settings.items():
        monkey = trainer.args if name == "use_bias_correction_kl" else trainer
        setattr(monkey, name, value)
    inputs = {
        "prompt_ids": part.prompt, "prompt_mask": part.prompt_mask,
        "completion_ids": part.completion, "completion_mask": part.mask, "advantages": A,
        "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": part.mask.sum(),
    }  # fmt: skip
    trainer.model.train()
    return trainer._compute_loss(trainer.model, inputs)


def ours(trainer, batch, kind, low, high, beta, unbiased, sizes):
    """In micro-batches of unequal sizes."""
    part, old, ref, A = batch
    divisor, whole = sa.grpo.normalizer(part.mask, kind, LONGEST), 0.0
    for rows in (slice(0, sizes), slice(sizes, 8)):
        piece = part[rows]
        width = piece.mask.shape[1]
        before, reference = old[rows, :width], ref[rows, :width]
        logp, _ = logprobs(trainer.model, piece, trainer.temperature)
        loss = sa.grpo.loss(logp, before, A[rows], piece.mask, kind, low, high, divisor)
        penalty = sa.grpo.kl_penalty(
            logp, before, reference, piece.mask, kind, "k3", divisor, unbiased=unbiased
        )
        whole = whole + loss + beta * penalty
    return whole


def test_trl_is_the_version_that_was_compared():
    assert importlib.metadata.version("trl").startswith("1.16.")


@pytest.mark.parametrize(("beta", "unbiased"), [(0.0, True), (0.04, True), (0.04, False)])
@pytest.mark.parametrize(
    ("loss_type", "level", "kind"),
    [
        ("grpo", "token", "grpo"),
        ("dr_grpo", "token", "dr_grpo"),
        ("dapo", "token", "dapo"),
        ("bnpo", "token", "dapo"),  # on one process without accumulation they are the same
        ("cispo", "token", "cispo"),
        ("grpo", "sequence", "gspo"),
    ],
)
def test_loss_and_gradient_are_trls(trainer, batch, loss_type, level, kind, beta, unbiased):
    low, high = (1.0, 1.2) if kind == "cispo" else (0.1, 0.15)
    theirs_high = 1 + high if kind == "cispo" else high  # TRL's bound of CISPO is the ratio's own
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = theirs(
        trainer, batch, loss_type=loss_type, importance_sampling_level=level,
        epsilon_low=low, epsilon_high=theirs_high, beta=beta, use_bias_correction_kl=unbiased,
    )  # fmt: skip
    gradients = torch.autograd.grad(expected, parameters)
    for sizes in (3, 7):
        found = ours(trainer, batch, kind, low, high, beta, unbiased, sizes)
        assert abs(found - expected).item() <= 1e-6 * max(1.0, abs(expected).item())
        here = torch.autograd.grad(found, parameters)
        difference = torch.cat([(a - b).flatten() for a, b in zip(here, gradients, strict=True)])
        assert difference.norm() <= 1e-6 * torch.cat([b.flatten() for b in gradients]).norm()
