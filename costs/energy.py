"""The energy of a network on an image: the hybrid-network paper's model (table I, section III), for any network.

======================== =======================================================================================
a layer in fp32          mac · MACs + 32 · memory_bit · (weights + inputs + outputs)
a layer in k bits        (few_bit_mac + few_bit_mac_bit · k) · MACs + memory_bit · k · (weights + inputs + outputs)
                         + mac · outputs, for the scaling factor
weights, activations     a MAC is charged at the wider of the two; binary weights on fp32 inputs are additions;
of different bits        memory at its own bits, scaling factors where the weights are quantized
an early exit            its layers, and for each element of the feature it is attached to two accesses and an addition
======================== =======================================================================================

Layers are convolutions and FC layers; their weights, inputs and outputs are counted in elements, once an image. What
the paper leaves out is left out: BatchNorm, ReLU, shortcuts, biases, and what is sent from the device to the server.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from costs.gates import BlockGates, Shares, Shrinks, block_gates
from costs.network import NetworkCosts
from networks.early_exit_network import EarlyExitNetwork
from networks.quantization import FULL, QuanConv


@dataclass(frozen=True)
class Chip:
    """Picojoules of single operations; ``conf/energy`` has them with their source.

    Attributes:
        name: of the technology.
        mac: 32-bit multiply-accumulate.
        addition: 32-bit addition.
        few_bit_mac, few_bit_mac_bit: multiply-accumulate of k bits, the part that does not grow, and that of each bit.
        memory_bit: access to a bit of memory.

    Raises:
        ValueError: an energy that is no number of at least 0.
    """

    name: str
    mac: float
    addition: float
    few_bit_mac: float
    few_bit_mac_bit: float
    memory_bit: float

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value: Any = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"Expected energy.{field.name} to be a number of pJ of at least 0, got {value}.")

    def layer(
        self, macs: int, weights: int, inputs: int, outputs: int, weight_bits: int = FULL, act_bits: int = FULL
    ) -> float:
        """Picojoules of a convolution or FC layer, its sizes in elements."""
        scaling = self.mac * outputs if weight_bits < FULL else 0.0
        memory = weight_bits * weights + act_bits * (inputs + outputs)
        return self._mac(weight_bits, act_bits) * macs + self.memory_bit * memory + scaling

    def _mac(self, weight_bits: int, act_bits: int) -> float:
        bits = max(weight_bits, act_bits)
        if bits < FULL:
            return self.few_bit_mac + self.few_bit_mac_bit * bits
        return self.addition if weight_bits == 1 else self.mac

    def branch(self, elements: int) -> float:
        """Picojoules of giving a feature of so many elements to an early exit besides the backbone, and pooling it."""
        return (2 * FULL * self.memory_bit + self.addition) * elements


class EnergyModel(Protocol):
    """What a chip spends: ``Chip``, or ``costs.hierarchy.Hierarchy``. It is linear in a layer's sizes."""

    @property
    def name(self) -> str:
        """Of the technology."""

    def layer(
        self, macs: int, weights: int, inputs: int, outputs: int, weight_bits: int = FULL, act_bits: int = FULL
    ) -> float:
        """Picojoules of a convolution or FC layer, its sizes in elements."""

    def branch(self, elements: int) -> float:
        """Picojoules of giving a feature of so many elements to an early exit besides the backbone."""


class LayerSize(NamedTuple):
    """A convolution or FC layer on one image, in elements."""

    macs: int
    weights: int
    inputs: int
    outputs: int
    weight_bits: int = FULL
    act_bits: int = FULL


def layer_sizes(module: nn.Module, image: Tensor) -> dict[str, LayerSize]:
    """Each convolution and FC layer of a module on one image (1, C, H, W), by its dotted name.

    The module is run on a copy in eval mode. An LSTM is taken as FC layers of its MACs and weights; of a layer that is
    used more than once the sizes add up.
    """
    module = copy.deepcopy(module).eval()
    found: dict[str, LayerSize] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        size = _size(layer, inputs[0].numel(), output[0] if isinstance(output, tuple) else output)
        if name in found:
            macs, weights, into, out = map(sum, zip(found[name][:4], size[:4], strict=True))
            size = LayerSize(macs, weights, into, out, *size[4:])
        found[name] = size

    for name, part in module.named_modules():
        if isinstance(part, (QuanConv, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LSTM)):
            part.register_forward_hook(partial(note, name))
    with torch.no_grad():
        module(image)
    return found


def _size(layer: nn.Module, inputs: int, output: Tensor) -> LayerSize:
    bits = (FULL, FULL)
    if isinstance(layer, QuanConv):
        bits, layer = (layer.weight_bits, layer.act_bits), layer.conv
    weights = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))
    if isinstance(layer, nn.Conv2d):
        macs = output.numel() * layer.weight[0].numel()
    elif isinstance(layer, nn.ConvTranspose2d):  # each input meets all weights of its channel
        macs = inputs * layer.weight[0].numel()
    else:  # each weight once a row, or once a step
        macs = weights * output.numel() // output.shape[-1]
    return LayerSize(macs, weights, inputs, output.numel(), *bits)


def network_energy(network: EarlyExitNetwork, chip: EnergyModel) -> NetworkCosts:
    """Microjoules of each block and exit of a network with early exits, on one image of its input shape."""
    device = next(network.parameters()).device
    image = torch.zeros(1, *network.chain.input_shape, device=device)
    sizes = layer_sizes(network.without_gates(), image)
    layers = {name: chip.layer(*size) for name, size in sizes.items()}
    shapes = network.chain.tap_shapes() if network.taps else ()
    branches = [chip.branch(math.prod(shapes[tap])) / 1e6 for tap in network.taps]
    heads = [_uj_under(layers, f"heads.{k}.") + branch for k, branch in enumerate(branches)]
    return NetworkCosts(
        "energy_uj",
        _uj_under(layers, "chain.stem"),
        tuple(_uj_under(layers, f"chain.blocks.{i}.") for i in range(len(network.chain.blocks))),
        (*heads, _uj_under(layers, "chain.head")),
        network.taps,
        0 if network.predictor is None else _uj_of(network.predictor, image, chip),
        gates_energy(network, sizes, chip),
        None if network.codec is None else network.codec.cut,
        _uj_under(layers, "codec.encoder."),
        0,
        _uj_under(layers, "codec.decoder."),
    )


def _uj_of(module: nn.Module, image: Tensor, chip: EnergyModel) -> float:
    return sum(chip.layer(*size) for size in layer_sizes(module, image).values()) / 1e6


def gates_energy(
    network: EarlyExitNetwork, sizes: Mapping[str, LayerSize], chip: EnergyModel
) -> tuple[BlockGates, ...]:
    """What the gates of each block cost and decide on, in microjoules; empty without gates.

    Args:
        sizes: of the layers of the network.
    """
    if network.gating is None:
        return ()

    def priced(module: nn.Module, feature: Tensor) -> float:
        return _uj_of(module, feature, chip)

    def shares(name: str, shrinks: Shrinks) -> Shares:
        size = sizes.get(name)
        if size is None:  # BatchNorm and ReLU are not charged
            return Shares(0, 0, 0)
        bits = size[4:]
        once = chip.layer(size.macs, size.weights, 0, 0, *bits) / 1e6
        inputs, outputs = chip.layer(0, 0, size.inputs, 0, *bits) / 1e6, chip.layer(0, 0, 0, size.outputs, *bits) / 1e6
        parts = [(once, shrinks.inputs + shrinks.outputs), (inputs, shrinks.inputs), (outputs, shrinks.outputs)]
        return Shares(*(sum(part for part, power in parts if power == exponent) for exponent in range(3)))

    return block_gates(network.chain, network.gating, priced, shares)


def _uj_under(layers: Mapping[str, float], prefix: str = "") -> float:
    """Microjoules of the layers whose names begin so."""
    return sum(energy for name, energy in layers.items() if name.startswith(prefix)) / 1e6
