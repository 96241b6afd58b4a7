"""What ``auto`` picks on this machine, and how its memory is kept."""

from __future__ import annotations

import ctypes
import sys

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


def keep_freed_memory() -> bool:
    """Has glibc keep the memory of freed tensors of up to 32 MiB, for the next ones; False where there is no glibc.

    It hands it back to Linux otherwise, and on a CPU the page faults that follow are a good part of a network's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt and mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))
