"""Quantized weights as they are stored: k bits each, eight to a byte where k is 1, with a scale for each filter.

In a state dict ``<conv>.weight`` gives way to ``<conv>.weight.packed`` (uint8) and ``<conv>.weight.scale`` (fp32, one a
filter). Weights made of these again quantize to the same codes and scales, so the network's outputs are the same to the
bit; the latent weights that they were rounded from are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from networks.quantization import FULL, QuanConv, per_filter, quantized_convs, weight_codes

PACKED, SCALE = ".packed", ".scale"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape to uint8, ⌈count · bits / 8⌉ of them, the highest bit of the first code first."""
    steps = 2**bits - 1
    numbers = codes.float().mul(2 ** (bits - 1)).add(steps).div(2).flatten().to(torch.uint8).cpu().numpy()
    each = np.unpackbits(numbers[:, None], axis=1)[:, -bits:]
    return torch.from_numpy(np.packbits(each))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,) again, in fp32.

    Raises:
        ValueError: so many codes of so many bits take another number of bytes.
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise ValueError(
            f"Expected {count} {bits}-bit weights in {-(-count * bits // 8)} bytes, got {packed.numel()} elements of "
            f"{packed.dtype}; they are of another precision."
        )
    each = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    numbers = each @ (1 << np.arange(bits)[::-1])
    return torch.from_numpy(numbers).float().mul(2).sub(2**bits - 1).div(2 ** (bits - 1))


def packed_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict with the weights of few bits packed."""
    state: dict[str, Tensor] = network.state_dict()
    for name, conv in _few_bit_weights(network):
        codes, scale = weight_codes(state.pop(name), conv.weight_bits)
        state[name + PACKED], state[name + SCALE] = pack(codes, conv.weight_bits), scale
    return state


def unpacked_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict for ``load_state_dict`` of such a network; what is not packed stays as it is.

    Raises:
        ValueError: packed weights of another precision or shape.
    """
    found = dict(state)
    for name, conv in _few_bit_weights(network):
        if name + PACKED in found and name + SCALE in found:
            weight, scale = conv.conv.weight, found.pop(name + SCALE)
            if scale.shape != weight.shape[:1]:
                raise ValueError(f"Expected {len(weight)} scales for {name}, got {tuple(scale.shape)}.")
            try:
                codes = unpack(found.pop(name + PACKED), conv.weight_bits, weight.numel())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            found[name] = codes.view_as(weight) * per_filter(scale.cpu(), weight.dim())
    return found


def _few_bit_weights(network: nn.Module) -> Iterator[tuple[str, QuanConv]]:
    for name, conv in quantized_convs(network).items():
        if conv.weight_bits != FULL:
            yield f"{name}.conv.weight".removeprefix("."), conv
