"""Every adapter with every way to start or scale it. A new adapter is one more line."""

import structadapt as sa

ADAPTERS = (
    sa.LoRA(rank=3, alpha=5.0),
    sa.LoRA(rank=3, alpha=5.0, scaling="alpha/sqrt(r)"),
    sa.LoRA(rank=2, alpha=0.5, scaling="constant"),
    sa.LoRA(rank=40),
    sa.DoRA(rank=3, alpha=5.0),
    sa.QuanTA(axes=3),
    sa.QuanTA(axes=3, init="paper"),
    sa.QuanTA(axes=3, init="zero_last"),
    sa.QuanTA(axes=4),
    sa.QuanTA(axes=5, init="paper"),
)
