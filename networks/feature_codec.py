"""The feature codec: what a device makes of the feature at the cut before it is sent, and what the server makes of it.

BottleNet++ (Shao and Zhang) as section V-C of the Exit Predictor paper has it: an encoder of one convolution, BatchNorm
and ReLU (in the sigmoid's place), a quantizer, and a decoder of one transposed convolution, BatchNorm and ReLU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks.chain import Chain, Shape, initialize

LEAST, MOST = 1, 8  # bits
FOLLOWS = 0.05  # how far the limit goes towards that of each batch
CANDIDATES, SEEN = 20, 2**14  # limits that are compared, on so many numbers of a batch


class FeatureCodec(nn.Module):
    """Compresses a feature (N, c, h, w) to codes (N, m, h', w') of a few bits, and brings them back.

    While the encoder trains nothing is quantized, and the quantizer's limit, that of least squared error of the first
    batch, follows those of the others. Afterwards what the decoder sees is what the codes say. The limit is the same
    for all images, so no more than the codes is sent.

    Args:
        shape: (c, h, w) of the feature.
        cut: the tap it is taken from.
        spatial: height and width are divided by this, rounded up.
        channels: so are the channels, rounded, at least one.
        bits: of a code, 1 to 8.
        signed: whether the feature has negative numbers, so that the decoder must not end with a ReLU.

    Raises:
        ValueError: bits, or a ratio, outside their range.
    """

    limit: Tensor

    def __init__(
        self, shape: Shape, cut: int, spatial: int = 2, channels: float = 4, bits: int = 8, signed: bool = False
    ):
        super().__init__()
        _check(spatial, channels, bits)
        inputs, height, width = shape
        self.shape, self.cut, self.bits = shape, cut, bits
        self.code_shape: Shape = (max(1, round(inputs / channels)), -(-height // spatial), -(-width // spatial))
        hidden, rows, columns = self.code_shape
        # BottleNet++: kernels as large as the stride where the map shrinks, 3x3 where it does not
        window: dict[str, Any] = {"kernel_size": spatial, "stride": spatial, "bias": False}
        if spatial == 1:
            window = {"kernel_size": 3, "padding": 1, "bias": False}
        rest = nn.ZeroPad2d((0, columns * spatial - width, 0, rows * spatial - height))
        self.encoder = nn.Sequential(
            rest if any(rest.padding) else nn.Identity(),
            nn.Conv2d(inputs, hidden, **window),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
        )
        closing = nn.Identity() if signed else nn.ReLU()
        self.decoder = nn.Sequential(nn.ConvTranspose2d(hidden, inputs, **window), nn.BatchNorm2d(inputs), closing)
        self.register_buffer("limit", torch.zeros(()))  # not known yet
        initialize(self)

    def narrowed(self, channels: int) -> tuple[FeatureCodec, Tensor]:
        """A copy whose code has so many channels, those of the encoder's filters of the largest l2 norm.

        Returns:
            The codec, and which channels of the code are left, (channels,) rising: its codes are those of this one.

        Raises:
            ValueError: more channels than there are, or none.
        """
        hidden, rows, columns = self.code_shape
        if not 1 <= channels <= hidden:
            raise ValueError(f"Expected from 1 to {hidden} channels of the code to be left, got {channels}.")
        lean = copy.deepcopy(self)
        filters: Any = lean.encoder[1].weight
        gone = filters.detach().flatten(1).norm(dim=1).argsort(stable=True)[: hidden - channels].tolist()
        kept = torch.tensor(sorted(set(range(hidden)) - set(gone)))
        tp.prune_conv_out_channels(lean.encoder[1], gone)
        tp.prune_batchnorm_out_channels(lean.encoder[2], gone)
        tp.prune_conv_in_channels(lean.decoder[0], gone)
        lean.code_shape = (channels, rows, columns)
        return lean, kept

    @property
    def payload_bytes(self) -> int:
        """Bytes that are sent for an image: the codes, and nothing else."""
        return -(-math.prod(self.code_shape) * self.bits // 8)

    def forward(self, x: Tensor) -> Tensor:
        """A feature (N, c, h, w) to what the server has of it, of the same shape."""
        y = self.encoder(x)
        if self.encoder.training:
            self._follow(y.detach())
        else:
            y = self._dequantized(self._quantized(y)).to(y.dtype)
        return self._decoded(y)

    def encode(self, x: Tensor) -> Tensor:
        """A feature (N, c, h, w) to codes (N, m, h', w'), uint8."""
        return self._quantized(self.encoder(x)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, m, h', w') to the feature (N, c, h, w) that the server goes on with."""
        return self._decoded(self._dequantized(codes.float()))

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (N, m, h', w') to what is sent: (N, ``payload_bytes``) uint8, the first code's highest bit first."""
        each = np.unpackbits(codes.cpu().numpy()[..., None], axis=-1)[..., -self.bits :]
        each = each.reshape(len(codes), math.prod(self.code_shape) * self.bits)
        return torch.from_numpy(np.packbits(each, axis=1))

    def unpack(self, payload: Tensor) -> Tensor:
        """What was sent (N, ``payload_bytes``) to codes (N, m, h', w'), uint8.

        Raises:
            ValueError: payloads of another codec.
        """
        if payload.dtype != torch.uint8 or payload.dim() != 2 or payload.shape[1] != self.payload_bytes:
            raise ValueError(
                f"Expected payloads of {self.payload_bytes} bytes, (N, {self.payload_bytes}) uint8, got "
                f"{tuple(payload.shape)} {str(payload.dtype).removeprefix('torch.')}."
            )
        each = np.unpackbits(payload.cpu().numpy(), axis=1, count=math.prod(self.code_shape) * self.bits)
        each = each.reshape(len(payload), *self.code_shape, self.bits)
        numbers = np.packbits(each, axis=-1, bitorder="big")[..., 0] >> (8 - self.bits)
        return torch.from_numpy(numbers).to(self.limit.device)

    @property
    def _steps(self) -> int:
        return 2**self.bits - 1

    def _quantized(self, y: Tensor) -> Tensor:
        """The encoder's output to whole numbers from 0 to 2^bits - 1, fp32."""
        return _levels(y.float(), self.limit, self._steps)

    def _dequantized(self, codes: Tensor) -> Tensor:
        return codes * (self.limit / self._steps)

    def _decoded(self, y: Tensor) -> Tensor:
        _, height, width = self.shape
        return self.decoder(y)[..., :height, :width]

    @torch.no_grad()
    def _follow(self, y: Tensor) -> None:
        y = y.float().flatten()
        y = y[:: len(y) // SEEN | 1]  # an odd step, or it would meet the same columns of every map
        limits = y.max() * torch.linspace(1 / CANDIDATES, 1, CANDIDATES, device=y.device)[:, None]
        errors = (_levels(y, limits, self._steps) * limits / self._steps - y).square().mean(1)
        best = limits[errors.argmin(), 0]
        self.limit.add_(torch.where(self.limit > 0, FOLLOWS, 1.0) * (best - self.limit))


def _levels(y: Tensor, limit: Tensor, steps: int) -> Tensor:
    return (y / limit.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1).mul(steps).round()


def _check(spatial: Any, channels: Any, bits: Any) -> None:
    if type(spatial) is not int or spatial < 1:
        raise ValueError(f"Expected method.codec.spatial to be a whole number of at least 1, got {spatial}.")
    if isinstance(channels, bool) or not isinstance(channels, int | float) or not 1 <= channels < math.inf:
        raise ValueError(f"Expected method.codec.channels, a ratio, to be a number of at least 1, got {channels}.")
    if type(bits) is not int or not LEAST <= bits <= MOST:
        raise ValueError(f"Expected method.codec.bits to be a whole number from {LEAST} to {MOST}, got {bits}.")


def bottlenet(
    chain: Chain, taps: Sequence[int], cut: int | None = None, spatial: int = 2, channels: float = 4, bits: int = 8
) -> FeatureCodec:
    """The codec for a chain with early exits at its taps.

    Args:
        cut: the tap that the device ends at; None for that of the last early exit, as in section II of the paper.
        spatial, channels, bits: of ``FeatureCodec``.

    Raises:
        ValueError: no such cut, one before an early exit, or ratios and bits outside their range.
    """
    _check(spatial, channels, bits)
    cut = checked_cut(chain, taps, cut)
    block: Any = chain.blocks[cut - 1]
    return FeatureCodec(chain.tap_shapes()[cut], cut, spatial, channels, bits, block.signed)


def checked_cut(chain: Chain, taps: Sequence[int], cut: int | None) -> int:
    """The tap that the device ends at; see ``bottlenet``.

    Raises:
        ValueError: no such cut, or one before an early exit.
    """
    blocks = len(chain.blocks)
    if cut is None and not taps:
        raise ValueError(
            f"Without an early exit the codec needs a place: give method.codec.cut, from 1 to {blocks}, the block "
            "after which the device ends."
        )
    cut = max(taps) if cut is None else cut
    if type(cut) is not int or not 1 <= cut <= blocks:
        raise ValueError(
            f"Expected method.codec.cut, the block after which the device ends, from 1 to {blocks}, got {cut}."
        )
    if taps and cut < max(taps):
        behind = next(k for k, tap in enumerate(taps, start=1) if tap > cut)
        raise ValueError(
            f"method.codec.cut={cut} lies before exit {behind}, which follows block {taps[behind - 1]}: early exits "
            f"are the device's; choose a cut of at least {max(taps)}, or method.exits before it."
        )
    return cut
