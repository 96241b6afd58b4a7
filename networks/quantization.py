"""Few-bit convolutions: the quantizers of the hybrid-network paper (equations 1 to 3) and its QuanConv layer (Fig. 2).

A quantizer of k bits has Z = 2^k - 1 steps over [-1, 1]: its 2^k levels are (2q - Z)/Z for q = 0 … Z (the paper's v0,
v1, v2 are 1, 2, ½). Convolutions see the integers 2q - Z, divided by 2^(k - 1): up to k = 8 these *codes* are exact in
fp32, bf16 and fp16, and sums of their products overflow in none. What is left, a factor for each filter, is multiplied
in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

FULL = 32  # bits of what is not quantized
MOST = 8
BEYOND = 1 + 2**-23  # the next number after 1 in fp32
SMALLEST = 1e-20  # a filter of zeros still has a scale that gradients can be divided by


def check_bits(name: str, bits: object) -> None:
    """Refuses a number of bits that there is no quantizer for.

    Raises:
        ValueError: naming ``name``.
    """
    if type(bits) is not int or not (1 <= bits <= MOST or bits == FULL):
        raise ValueError(f"Expected {name} to be a whole number of bits from 1 to {MOST}, or {FULL}, got {bits}.")


def unit(bits: int) -> float:
    """What a code of 1 stands for: 2^(k - 1)/Z."""
    return 2 ** (bits - 1) / (2**bits - 1)


def codes_of(x: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The code of the level next to each value, beyond [-1, 1] of the outermost. One bit is the sign; that of 0 is 1.

    Args:
        dtype: of the codes, by default that of ``x``.
    """
    dtype = dtype or x.dtype
    if bits == 1:  # the sign survives any rounding, and -0 counts as negative; adding nothing keeps NaN
        x = x.to(dtype)
        return torch.copysign(torch.ones((), dtype=dtype, device=x.device), x).add_(x, alpha=0)
    half = (2**bits - 1) / 2
    # Z is odd, so that no level is 0: rounding to levels is rounding down to integers, then half a step up
    return (x * half).clamp_(-half, half).floor_().add_(0.5).mul_(2 ** (2 - bits)).to(dtype)


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A filter bank (C, …) as codes (C, …) and what a code of 1 stands for in each filter (C,).

    Filters are divided by their largest absolute value, quantized, and scaled back by least squares,
    α = ⟨W, Wq⟩/⟨Wq, Wq⟩, which for the sign is mean |W| (equation 2). α is rounded to 16 significant bits: codes times
    scale are then exact in fp32 and quantize to the very same codes and scale, so that packed weights lose nothing.
    """
    weight = weight.detach().float()
    filter = tuple(range(1, weight.dim()))
    if bits == 1:
        codes, alpha = codes_of(weight, 1), weight.abs().mean(filter)
    else:
        largest = weight.abs().amax(filter, keepdim=True)
        # of a filter that is all but zero, the largest code would not be the outermost
        codes = codes_of(torch.where(largest > SMALLEST, weight / largest, 0), bits)
        alpha = (weight * codes).sum(filter) / codes.square().sum(filter)
    return codes, _sixteen_bits(alpha.clamp_min(SMALLEST))


def _sixteen_bits(x: Tensor) -> Tensor:
    """Numbers rounded to 16 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**16).round(), exponent - 16)


class _ActivationCodes(Function):
    """Forward the codes, in the type that autocast computes in; backward straight through, within [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bits = bits
        return codes_of(x, bits, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        within = torch.ops.aten.hardtanh_backward(grads[0].to(x.dtype), x, -BEYOND, BEYOND)
        return within if ctx.bits == 1 else within.div_(unit(ctx.bits)), None, None


class _WeightCodes(Function):
    """Forward codes and scales; backward as if codes times scale were the weights, where these are within [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes, scale = weight_codes(weight, bits)
        ctx.save_for_backward(weight.abs() <= 1, scale)
        ctx.mark_non_differentiable(scale)
        return codes.to(dtype), scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        inside, scale = ctx.saved_tensors
        return grads[0].float() / per_filter(scale, inside.dim()) * inside, None, None


def per_filter(scale: Tensor, dims: int) -> Tensor:
    return scale.view(-1, *[1] * (dims - 1))


def computed_in(x: Tensor) -> torch.dtype:
    """The type that convolutions of this tensor are computed in."""
    kind = x.device.type
    there = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if there else x.dtype


class QuanConv(nn.Module):
    """BatchNorm, activation quantizer, convolution with quantized weights: Fig. 2 of the hybrid-network paper.

    Inputs are brought to [-1, 1] by clipping; with 32 bits nothing follows that. Weights are kept in fp32, their
    *latent* values, which gradients reach straight through the quantizer and ``clip`` holds within [-1, 1].

    Args:
        conv: in fp32; gives its weights, geometry and bias, which is not quantized and added last.
        weight_bits, act_bits: 1 to 8, or 32.
        norm: the BatchNorm to begin with, of the convolution's input; None for a fresh one.

    Raises:
        ValueError: other bits.
    """

    def __init__(self, conv: nn.Conv2d, weight_bits: int, act_bits: int, norm: nn.BatchNorm2d | None = None):
        super().__init__()
        check_bits("weight_bits", weight_bits)
        check_bits("act_bits", act_bits)
        self.norm = nn.BatchNorm2d(conv.in_channels) if norm is None else norm
        self.conv = conv
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self._kept: tuple[Tensor, tuple[Any, ...], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_channels, h, w) to (N, out_channels, h', w'), in fp32 where anything is quantized."""
        x = self.norm(x.float())  # or the codes would depend on the floating-point mode
        dtype = computed_in(x)
        x = F.hardtanh(x) if self.act_bits == FULL else _ActivationCodes.apply(x, self.act_bits, dtype)
        weight, scale = self._weights(dtype)
        factor = 1 if self.act_bits == FULL else unit(self.act_bits)
        conv = self.conv
        out = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        if scale is not None:
            out = out * (scale * factor)[:, None, None]
        elif self.act_bits != FULL:
            out = out.float() * factor
        return out if conv.bias is None else out + conv.bias[:, None, None]

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What is convolved with, and its scales; in evaluation they are kept until the weights change.

        Changes in place through ``weight.data`` go unseen.
        """
        weight = self.conv.weight
        if self.weight_bits == FULL:
            return weight, None
        anew = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference()
        if anew:
            return _WeightCodes.apply(weight, self.weight_bits, dtype)
        state = (weight._version, weight.data_ptr(), self.weight_bits, dtype)
        if self._kept is None or self._kept[0] is not weight or self._kept[1] != state:
            codes, scale = weight_codes(weight, self.weight_bits)
            self._kept = weight, state, (codes.to(dtype), scale)
        return self._kept[2]

    def clip(self) -> None:
        """Brings the latent weights, if any, back into [-1, 1], beyond which no gradient would reach them."""
        if self.weight_bits != FULL:
            with torch.no_grad():
                self.conv.weight.clamp_(-1, 1)

    def extra_repr(self) -> str:
        return f"weight_bits={self.weight_bits}, act_bits={self.act_bits}"


def normalized_relu(channels: int) -> nn.Sequential:
    """BatchNorm and ReLU: what ends a pre-activation network."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def quantized_convs(module: nn.Module) -> dict[str, QuanConv]:
    """The QuanConvs in a module, by their dotted names."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuanConv)}


def clip_latent_weights(module: nn.Module) -> None:
    """To be called after each step of the optimizer, as in XNOR-Net's training."""
    for part in quantized_convs(module).values():
        part.clip()
