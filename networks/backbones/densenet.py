"""Densely connected networks: DenseNet-BC for small images, and torchvision's for large ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn

from networks.backbones.pretrained import torchvision_model
from networks.chain import Chain, Gates, initialize, require_size
from networks.quantization import QuanConv
from networks.skipping import Skippable, put


class DenseLayer(Skippable):
    """Appends ``growth`` new channels to what comes in; a skipped layer repeats the ``growth`` channels before them.

    Those are the previous layer's output (Dual Dynamic Inference paper, Fig. 3); in the first layer of a stage, the
    last channels of the stem or of the transition. The transition to a new stage belongs to that stage's first layer
    and always runs.
    """

    layers_name = "layer"

    def __init__(
        self, layer: nn.Sequential, in_channels: int, channels: int, growth: int, transition: nn.Module | None
    ):
        super().__init__(in_channels, channels + growth, gate_channels=growth, skippable=True)
        self.transition = nn.Identity() if transition is None else transition
        self.layer = layer

    @property
    def entered_channels(self) -> int:
        return self.out_channels - self.gate_channels

    @property
    def signed(self) -> bool:
        return True

    def enter(self, x: Tensor) -> Tensor:
        """Halves the map where a transition leads in."""
        return self.transition(x)

    def remainder(self, entered: Tensor) -> Tensor:
        return entered[:, -self.gate_channels :]

    def mix(self, new: Tensor, remainder: Tensor, mask: Tensor | None) -> Tensor:
        return new if mask is None else mask * new + (1 - mask) * remainder

    def join(self, entered: Tensor, mixed: Tensor) -> Tensor:
        return torch.cat([entered, mixed], dim=1)

    def for_some(self, entered: Tensor, some: Tensor, rows: Tensor, gates: Gates = Gates()) -> Tensor:
        mixed = self.mixed(some, self.remainder(some), gates)
        return self.join(entered, put(self.remainder(entered).clone(), 0, rows, mixed))

    @property
    def convs(self) -> list[nn.Conv2d]:
        return [part for part in self.layer if isinstance(part, nn.Conv2d)]

    def quantized(self, weight_bits: int, act_bits: int, closes: bool = False) -> DenseLayer:
        """The layer's BatchNorms go with their convolutions, quantizers replace its ReLUs; the transition stays.

        Dense layers are pre-activation ones as they are: whatever follows has its own BatchNorm, and nothing closes.
        """
        norms = [part for part in self.layer if isinstance(part, nn.BatchNorm2d)]
        pairs = zip(self.convs, norms, strict=True)
        layer = nn.Sequential(*(QuanConv(conv, weight_bits, act_bits, norm) for conv, norm in pairs))
        channels = self.out_channels - self.gate_channels
        transition = None if isinstance(self.transition, nn.Identity) else self.transition
        return DenseLayer(layer, self.in_channels, channels, self.gate_channels, transition)


def bottleneck_layer(in_channels: int, growth: int) -> nn.Sequential:
    """BN-ReLU-1x1(4·growth)-BN-ReLU-3x3(growth), no biases."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, 4 * growth, 1, bias=False),
        nn.BatchNorm2d(4 * growth),
        nn.ReLU(inplace=True),
        nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
    )


def transition_layer(in_channels: int, out_channels: int) -> nn.Sequential:
    """BN-ReLU-1x1-average pool 2: halves the resolution between stages."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.AvgPool2d(2),
    )


def densenet_bc(
    depth: int,
    num_classes: int,
    input_shape: Sequence[int] = (3, 32, 32),
    growth: int = 12,
    compression: float = 0.5,
) -> Chain:
    """DenseNet-BC of ``depth`` = 6n+4 layers: three stages of n bottleneck layers (Huang et al., table 2).

    Raises:
        ValueError: a depth that is not 6n+4, or images smaller than 4x4.
    """
    n, rest = divmod(depth - 4, 6)
    if n < 1 or rest:
        lower = 6 * max(n, 1) + 4
        raise ValueError(f"A DenseNet-BC has depth 6n+4, such as {lower} or {lower + 6}; got depth {depth}.")
    require_size(f"densenet{depth}", input_shape, 4)
    channels = 2 * growth
    stem = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
    blocks = []
    for stage in range(3):
        for i in range(n):
            came, transition = channels, None
            if stage and i == 0:
                channels = int(came * compression)
                transition = transition_layer(came, channels)
            blocks.append(DenseLayer(bottleneck_layer(channels, growth), came, channels, growth, transition))
            channels += growth
    chain = Chain(stem, blocks, _head(nn.BatchNorm2d(channels), nn.Linear(channels, num_classes)), [n] * 3,
                  input_shape, num_classes)  # fmt: skip
    initialize(chain)
    return chain


def torchvision_densenet(
    model: str, num_classes: int, input_shape: Sequence[int] = (3, 224, 224), weights: str | None = None
) -> Chain:
    """One of torchvision's DenseNets (``densenet121``, ``densenet201``, …) as a chain; see ``torchvision_model``.

    Raises:
        ValueError: images smaller than 29x29 too.
    """
    require_size(model, input_shape, 29)
    return chain_of_densenet(
        torchvision_model(model, num_classes, input_shape, weights, "features.conv0", "classifier"), input_shape
    )


def chain_of_densenet(model: torchvision.models.DenseNet, input_shape: Sequence[int]) -> Chain:
    """Regroups the modules of a torchvision DenseNet, which they stay shared with, into a chain."""
    parts = dict(model.features.named_children())
    stem = nn.Sequential(parts["conv0"], parts["norm0"], parts["relu0"], parts["pool0"])
    stages = [list(parts[f"denseblock{k}"].children()) for k in range(1, 5)]
    transitions = [None, *(parts[f"transition{k}"] for k in range(1, 4))]
    blocks = []
    for transition, layers in zip(transitions, stages, strict=True):
        for i, layer in enumerate(layers):
            leading = transition if i == 0 else None
            channels = layer.norm1.num_features
            came = channels if leading is None else leading.norm.num_features
            body = nn.Sequential(layer.norm1, layer.relu1, layer.conv1, layer.norm2, layer.relu2, layer.conv2)
            blocks.append(DenseLayer(body, came, channels, layer.conv2.out_channels, leading))
    assert all(before.out_channels == after.in_channels for before, after in pairwise(blocks))
    head = _head(parts["norm5"], model.classifier)
    return Chain(stem, blocks, head, [len(stage) for stage in stages], input_shape, model.classifier.out_features)


def _head(norm: nn.Module, classifier: nn.Module) -> nn.Sequential:
    return nn.Sequential(norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
