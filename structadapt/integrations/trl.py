"""Merged weights for TRL's vLLM sync: out of place, under the names of the base model.

    trainer = GRPOTrainer(model=sa.adapt(model, sa.DoRA()), args=GRPOConfig(use_vllm=True, ...))
    sync_merged_weights(trainer)

vLLM knows none of our tensors, so it is sent W' in the place of W. TRL's own way for a PeftModel
merges the live model for the length of a sync; here each W' is a new tensor, one layer at a time,
and the live model is never touched.

A low precision W' holds only part of a small update: the sampler is then not quite the policy that
is trained. Keep `vllm_importance_sampling_correction` on.

Do not adapt the output head: TRL computes log-probabilities from its weight and never calls it.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from structadapt.adapted import Adapted, whole
from structadapt.layers import find_adapted, plain_name, unwrapped

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


@torch.no_grad()
def merged_named_parameters(
    model: nn.Module, gather: Gather = lambda parameters: nullcontext()
) -> Generator[tuple[str, Tensor], None, None]:
    """(name, tensor) of every parameter that the base model has, with W' in the place of W, and the
    bias with what was added to it.

    Names are the base model's own: those that DistributedDataParallel, torch.compile, activation
    checkpointing and PeftModel add are left out, and so are adapter tensors. W' is computed in at
    least fp32, one layer at a time, and rounded to the dtype of W; other tensors are the model's
    own. Nothing in the model changes, also if the iterator is abandoned. A model without adapters
    yields its parameters.

    gather: a context in which the given parameters are whole (DeepSpeed ZeRO-3). DTensors
        (FSDP2) are gathered here; every rank must iterate.

    Raises ValueError, at the first tensor, if an adapted weight is shared with another module or a
    trained bias has no bias to be added to; when its turn comes, if a W' is not finite.
    """
    model = unwrapped(model)
    layers = find_adapted(model)
    _refuse_shared(model, layers)
    _refuse_lone_bias(layers, gather)
    owners = {id(layer.weight): (name, layer) for name, layer in layers.items()}
    biased = {id(m.bias): m for m in layers.values() if "delta_bias" in m.tensor_names}
    ours = {id(t) for layer in layers.values() for t in layer.tensors().values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in ours:
            continue
        layer_name, layer = owners.get(id(parameter), (name, None))
        name = plain_name(name)
        if id(parameter) in biased:
            delta = biased[id(parameter)].tensors()["delta_bias"]
            with gather([parameter, cast(nn.Parameter, delta)]):
                total = whole(parameter.detach()) + whole(delta.detach())
                yield name, total.to(parameter.dtype)
            continue
        if layer is None:
            with gather([parameter]):
                yield name, whole(parameter.data)
            continue
        with gather([parameter, *layer.trained_tensors()]):
            merged = layer.adapted_weight().to(layer.frozen_weight.dtype)
            if not torch.isfinite(merged).all():
                raise ValueError(f"{layer_name}: the merged weight is not finite; not sent")
            yield name, merged


def sync_merged_weights(trainer: Any) -> None:
    """Let a TRL trainer with vLLM (or its `VLLMGeneration`) send merged weights.

    Call it once, after the trainer is built. Raises ValueError if it does not use vLLM, or under
    FSDP 1, which flattens parameters: use FSDP 2 or DistributedDataParallel.
    """
    generation = getattr(trainer, "vllm_generation", trainer)
    if not isinstance(generation, VLLMGeneration):
        raise ValueError(
            f"{type(trainer).__name__} has no vllm_generation: set use_vllm=True, or leave this "
            "call out, since TRL's own generation runs the adapted model itself"
        )
    if generation._dist.fsdp_version == 1:
        raise ValueError("FSDP 1 flattens parameters: use FSDP 2 or DistributedDataParallel")
    generation.__class__ = MergedVLLMGeneration


class MergedVLLMGeneration(VLLMGeneration):
    """TRL's vLLM backend that sends merged weights. Made by `sync_merged_weights`."""

    def _iter_named_params(self) -> Generator[tuple[str, Tensor], None, None]:
        yield from merged_named_parameters(self.model, self._dist.gather_params)


def _refuse_lone_bias(layers: dict[str, Adapted], gather: Gather) -> None:
    for name, layer in layers.items():
        if layer.bias is None and "delta_bias" in layer.tensor_names:
            delta = cast(nn.Parameter, layer.tensors()["delta_bias"])
            with gather([delta]):
                if whole(delta.detach()).any():
                    raise ValueError(
                        f"{name} has a delta_bias and no bias to add it to: vLLM's model has no "
                        "place for it"
                    )


def _refuse_shared(model: nn.Module, layers: dict[str, Adapted]) -> None:
    owners = {id(layer.weight): (name, layer) for name, layer in layers.items()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner, layer = owners.get(id(parameter), (name, module))
            if layer is not module:
                raise ValueError(
                    f"{owner} and {name} share a weight: vLLM would change both. Untie them "
                    "(tie_word_embeddings=False), or exclude the layer"
                )
