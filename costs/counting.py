"""Operation counts of a module on one input, in two conventions, on top of fvcore's tracing.

=========== ====================================================================================================
``macs``    multiply-accumulates of convolutions and linear layers, without bias; an LSTM is 4·h·(in + h) a step
``ptflops`` the Exit Predictor paper's: convolutions and linear layers with bias, BatchNorm 2 per element, a ReLU
            module 1 per element (a functional ReLU 0), every pool 1 per input element, an LSTM with its biases
=========== ====================================================================================================
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_jit, elementwise_flop_counter, get_shape, linear_flop_jit
from torch import Tensor, nn

Convention = Literal["macs", "ptflops"]
CONVENTIONS: tuple[Convention, ...] = ("macs", "ptflops")
Handle = Callable[[list[Any], list[Any]], "int | Counter[str]"]

RELUS = ("aten::relu", "aten::relu_")
POOLS = ("aten::max_pool2d", "aten::avg_pool2d", "aten::adaptive_avg_pool2d", "aten::adaptive_max_pool2d")
# fvcore counts these, neither convention does
UNCOUNTED = ("aten::group_norm", "aten::layer_norm", "aten::instance_norm", "aten::upsample_nearest2d",
             "aten::upsample_bilinear2d", "aten::grid_sampler")  # fmt: skip


def count(module: nn.Module, *inputs: Tensor, convention: Convention = "macs") -> Counter[str]:
    """Operations of every submodule, by its dotted name; the module itself is ``""``.

    The count is made on a copy in eval mode, so the module's mode and statistics stay as they are.

    Args:
        module: any module.
        inputs: its inputs; with batch size 1 the counts are per image.
        convention: ``macs`` or ``ptflops``, see the module's docstring.

    Raises:
        ValueError: another convention.
    """
    if convention not in ("macs", "ptflops"):
        raise ValueError(f"Expected convention 'macs' or 'ptflops', got {convention!r}.")
    module = copy.deepcopy(module).eval()
    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(**dict.fromkeys(UNCOUNTED, _free), **_handles(convention))
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit, which fvcore traces with
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python")
        by_operator = analysis.by_module_and_operator()
    counts = Counter({name: round(sum(operators.values())) for name, operators in by_operator.items()})
    return _without_functional_relus(counts, by_operator, module)


def _without_functional_relus(
    counts: Counter[str], by_operator: dict[str, Counter[str]], module: nn.Module
) -> Counter[str]:
    # a trace does not tell F.relu from nn.ReLU, but the module that it lies in does
    relus: Counter[str] = Counter()
    for name, part in module.named_modules():
        if isinstance(part, nn.ReLU):
            parents = ["", *_prefixes(name)] if name else [""]
            relus.update(dict.fromkeys(parents, by_operator[name]["relu"]))
    for name in counts:
        counts[name] += relus[name] - by_operator[name]["relu"]
    return counts


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _free(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def _handles(convention: Convention) -> dict[str, Handle]:
    if convention == "macs":
        return {**dict.fromkeys(("aten::batch_norm", *RELUS, *POOLS), _free), "aten::lstm": _lstm(bias=False)}
    return {
        "aten::_convolution": _with_bias(conv_flop_jit),
        "aten::linear": _with_bias(linear_flop_jit),
        "aten::batch_norm": elementwise_flop_counter(0, 2),
        "aten::lstm": _lstm(bias=True),
        **{op: _named("pool", elementwise_flop_counter(1, 0)) for op in POOLS},
        **{op: _named("relu", elementwise_flop_counter(0, 1)) for op in RELUS},
    }


def _named(name: str, handle: Callable) -> Handle:
    def named(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter({name: handle(inputs, outputs)})

    return named


def _with_bias(handle: Callable) -> Handle:
    def counted(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        without = handle(inputs, outputs)
        without = sum(without.values()) if isinstance(without, Counter) else without
        bias = math.prod(get_shape(outputs[0])) if get_shape(inputs[2]) else 0
        return Counter({"with bias": without + bias})

    return counted


def _lstm(bias: bool) -> Handle:
    def counted(inputs: list[Any], outputs: list[Any]) -> int:
        # aten::lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        steps = math.prod(get_shape(inputs[0])[:-1])
        layers, directions = inputs[4].toIValue(), 2 if inputs[7].toIValue() else 1
        hidden = get_shape(outputs[0])[-1] // directions
        biases = 2 * 4 * hidden if bias and inputs[3].toIValue() else 0
        widths = [get_shape(inputs[0])[-1]] + [hidden * directions] * (layers - 1)
        return steps * directions * sum(4 * hidden * (width + hidden) + biases for width in widths)

    return counted
