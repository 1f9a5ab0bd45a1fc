"""The one place where an op meets its implementation.

Adapters and GRPO call these names and never a kernel. Every op runs its plain torch form from
`kernels/reference.py`, where formulas, shapes and dtypes are written down.
"""

from structadapt.kernels.reference import (
    dora_linear,
    dora_weight,
    eye_gate,
    lora_linear,
    lora_weight,
    no_autocast,
    quanta_apply,
    quanta_apply_minus_eye,
    quanta_pairs,
    row_norm,
    token_logprobs,
    wide_dtype,
)

__all__ = [
    "dora_linear",
    "dora_weight",
    "eye_gate",
    "lora_linear",
    "lora_weight",
    "no_autocast",
    "quanta_apply",
    "quanta_apply_minus_eye",
    "quanta_pairs",
    "row_norm",
    "token_logprobs",
    "wide_dtype",
]
