"""How a kernel's output is compared with float64: nothing hides in a norm over everything."""

import torch

# ||out - ref|| / ||ref|| of one rounding of the output, fp32 sums inside (kernels.md, section 6).
BOUNDS = {torch.bfloat16: 2.2e-3, torch.float16: 3e-4, torch.float32: 1e-6}
DTYPES = tuple(BOUNDS)


def relative(out, ref):
    out, ref = out.double(), ref.double()
    return float((out - ref).norm() / ref.norm().clamp(min=1e-300))


def check(out, ref, bound=None, what="", lines=4.0):
    """`out` is `ref` (float64, of the same rounded inputs) within the roundings of its dtype: as a
    whole, and `lines` times as far in any row and column, where a wrong edge of a tile shows."""
    assert out.shape == ref.shape, f"{what}: {tuple(out.shape)} instead of {tuple(ref.shape)}"
    bound = bound or BOUNDS[out.dtype]
    out, ref = out.double(), ref.double()
    assert torch.isfinite(out).all() or not torch.isfinite(ref).all(), f"{what}: not finite"
    same = out == ref  # infinities too
    error = torch.where(same, 0.0, (out - ref).abs())
    whole = float(error.norm() / ref.norm().clamp(min=1e-300))
    assert whole <= bound, f"{what}: {whole:.2e} from float64, {bound:.1e} allowed"
    size = ref.norm() / max(ref.numel(), 1) ** 0.5  # of a typical number
    for dim in range(ref.dim()):
        others = [d for d in range(ref.dim()) if d != dim]
        if not others or not ref.numel():
            continue
        floor = size * (ref.numel() / ref.shape[dim]) ** 0.5
        scale = torch.linalg.vector_norm(ref, dim=others)
        scale = torch.maximum(scale, 0.1 * floor).clamp(min=1e-300)
        worst = float((torch.linalg.vector_norm(error, dim=others) / scale).max())
        few = 3.0 if ref.numel() < 16 * ref.shape[dim] else 1.0  # nothing averages out
        assert worst <= few * lines * bound, f"{what}: {worst:.2e} along dimension {dim}"


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)
