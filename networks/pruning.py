"""Filter pruning of the on-device network, the baseline of the Exit Predictor paper (section V-B, figures 7 and 8).

Which layers lose what together is worked out by torch-pruning, which traces the network and takes the weights apart.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks.chain import Block
from networks.early_exit_network import EarlyExitNetwork

log = logging.getLogger(__name__)

# what autograd calls the operations that make channel k of channel k alone; T brings an FC layer its weight
PER_CHANNEL = {"Add", "Relu", "MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "Mean", "T"}
PADDING = "ConstantPadNd"  # shifts the channels, which torch-pruning does not see
RENUMBERING = {tp.ops.OPTYPE.CONCAT, tp.ops.OPTYPE.RESHAPE}  # and which torch-pruning follows

SQUARED_NORM = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)


class Side(NamedTuple):
    """The output or the input channels of a layer; ``remove(layer, channels)`` takes some of them away."""

    layer: nn.Module
    remove: Callable[[nn.Module, list[int]], nn.Module]


@torch.inference_mode(False)  # and with gradients, which the tracing needs
def pruned(network: EarlyExitNetwork, ratio: float) -> EarlyExitNetwork:
    """A copy in eval mode whose on-device convolutions have lost the filters of the lowest l2 norm.

    The device has the stem, the blocks before the cut (the tap of the last early exit) and the early exits' heads.
    There each convolution of n filters keeps ⌊n·(1 − ratio)⌋ of them, as torch-pruning rounds, and at least one. The
    norms are those of whole filters, before any is removed. BatchNorms and whatever the filters fed shrink with them,
    the server's first layers too: where no shortcut crosses the cut, the feature sent has fewer channels. FC layers
    keep their outputs, the server keeps its filters, and an Exit Predictor stays as it is.

    Filters that an addition ties together are ranked by their joint norm and go together. All of them stay where one
    belongs to the server, as in a residual stage that goes on behind the cut, and where an operation between them is
    not known to keep channels apart, as the padded shortcuts (option A) of a ResNet do not.

    Args:
        network: with at least one early exit; left as it is.
        ratio: share of the filters to remove, from 0 to below 1; the paper's is 0.1.

    Raises:
        ValueError: another ratio, or a network without an early exit.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"Expected a pruning ratio of at least 0 and below 1, got {ratio}; the paper's is 0.1.")
    if not network.taps:
        raise ValueError("Expected a network with an early exit, got none: there is no on-device network to prune.")
    lean = copy.deepcopy(network).eval()
    body = nn.ModuleList([lean.chain, lean.heads])
    # in channels_last autograd records other operations
    body.to(memory_format=torch.contiguous_format)
    for side, channels in _removals(lean, ratio).items():
        side.remove(side.layer, sorted(channels))
    _set_channels(lean)
    trainable = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in lean.named_parameters():
        parameter.requires_grad_(trainable[name])
    if _is_channels_last(network.chain):
        body.to(memory_format=torch.channels_last)
    return lean


def _removals(network: EarlyExitNetwork, ratio: float) -> dict[Side, set[int]]:
    """The channels that go, numbered as they are in the whole network."""
    removals: dict[Side, set[int]] = defaultdict(set)
    for group in _groups(network):
        norms = SQUARED_NORM([item for item in group if item.dep.handler == tp.prune_conv_out_channels])
        lowest = set(_lowest(norms, ratio))
        for item in group:
            if isinstance(item.dep.layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
                gone = {i for i, filter in zip(item.idxs, item.root_idxs, strict=True) if filter in lowest}
                removals[Side(item.dep.layer, item.dep.handler)] |= gone
    return {side: channels for side, channels in removals.items() if channels}


def _lowest(norms: Tensor, ratio: float) -> list[int]:
    n = len(norms)
    # rounded first: 100 * (1 - 0.9) is a little less than 10 in floating point
    kept = max(1, int(round(n * (1 - ratio), 9)))
    return norms.argsort(stable=True)[: n - kept].tolist()


def _groups(network: EarlyExitNetwork) -> Iterator[Any]:
    """Filters that may be removed, with all that goes with them: one torch-pruning group for each set that is tied."""
    # without the predictor, which is not to be traced
    bare = EarlyExitNetwork(network.chain, network.taps, list(network.heads)).eval().requires_grad_()
    image = _image(network)
    with torch.autocast(image.device.type, enabled=False):
        graph = tp.DependencyGraph().build_dependency(bare, image)
    unknown = {_operation(node) for node in graph.module2node.values() if _is_elementwise(node)} - PER_CHANNEL
    if unknown - {PADDING}:
        log.warning(
            "Filters that feed %s are not pruned: see networks.pruning.PER_CHANNEL.", ", ".join(sorted(unknown))
        )
    parts = (network.chain.stem, *network.chain.blocks[: network.taps[-1]], network.heads)
    device = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    done: set[nn.Module] = set()
    for conv in device:
        if conv not in done:
            group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels)))
            done |= {item.dep.layer for item in group if item.dep.handler == tp.prune_conv_out_channels}
            if all(_is_prunable(item.dep, device) for item in group):
                yield group


def _is_prunable(dep: Any, device: list[nn.Conv2d]) -> bool:
    """Whether this part of a group can lose channels: not as a filter of the server, as a class, or unknown to us."""
    layer, node = dep.layer, dep.target
    if isinstance(layer, nn.Conv2d):
        return layer in device or (layer.groups == 1 and dep.handler == tp.prune_conv_in_channels)
    if isinstance(layer, nn.Linear):
        return dep.handler == tp.prune_linear_in_channels
    if _is_elementwise(node):
        return _operation(node) in PER_CHANNEL
    return isinstance(layer, nn.BatchNorm2d) or node.type in RENUMBERING


def _is_elementwise(node: Any) -> bool:
    """Whether torch-pruning takes the operation, rightly or not, for one that keeps channels apart."""
    return node.type == tp.ops.OPTYPE.ELEMENTWISE


def _operation(node: Any) -> str:
    """Its name in autograd, such as ``Relu``."""
    return node.grad_fn.name().partition("Backward")[0]


def _set_channels(network: EarlyExitNetwork) -> None:
    """Makes what the blocks and the chain say of their channels true again."""

    def measure(block: Block, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        block.in_channels, block.out_channels = inputs[0].shape[1], output.shape[1]
        if block.gate_channels:
            convs = [part for part in block.modules() if isinstance(part, nn.Conv2d)]
            block.gate_channels = convs[-1].out_channels
            # a skipped dense layer repeats as many channels, which must be there
            before = block.out_channels - block.gate_channels
            block.skippable &= before == 0 or before >= block.gate_channels

    hooks = [part.register_forward_hook(measure) for part in network.modules() if isinstance(part, Block)]
    with torch.no_grad():
        network(_image(network))
    for hook in hooks:
        hook.remove()
    names = ("in_channels", "out_channels", "gate_channels", "skippable")
    network.chain.info = tuple(
        replace(info, **{name: getattr(block, name) for name in names})
        for info, block in zip(network.chain.info, network.chain.blocks, strict=True)
    )


def _image(network: EarlyExitNetwork) -> Tensor:
    return next(network.chain.parameters()).new_zeros(1, *network.chain.input_shape)


def _is_channels_last(module: nn.Module) -> bool:
    weights = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
