"""What ``auto`` picks on this machine."""

from __future__ import annotations

import torch


def pick_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the processor that trains multiplies bf16 faster than fp32, otherwise ``32-true``."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "32-true"
    if accelerator == "auto" and torch.backends.mps.is_available():
        return "32-true"
    # torch answers these only by private names; a version without them trains in fp32
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return "bf16-mixed" if any(check and check() for check in checks) else "32-true"
