"""The energy of a layer with three levels of memory: equation 6 of Dual Dynamic Inference.

``E = Σ #acc_i · e_i + #MAC · e_MAC`` over main memory, cache and registers. Accesses are those of an output-stationary
array of ``rows`` x ``columns`` processing elements as SCALE-Sim has it, all of them busy:

=========== ==========================================================================================================
main memory each weight, input and output once a layer
cache       each of them once, on its way from or to main memory; a weight is read again for every ``rows`` pixels and
            an input for every ``columns`` filters, so ``MACs / rows + MACs / columns`` reads in all
registers   ``register_accesses`` for each MAC
=========== ==========================================================================================================

An access or a MAC of k bits takes k / 32 of one of 32 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from networks.quantization import FULL


@dataclass(frozen=True)
class Hierarchy:
    """Picojoules of single operations; ``conf/energy`` has them with their source.

    Attributes:
        name: of the technology.
        mac: 32-bit multiply-accumulate.
        register, cache, memory: 32-bit access.
        register_accesses: of a multiply-accumulate.
        rows, columns: of the array.

    Raises:
        ValueError: a number below 0, or an array without elements.
    """

    name: str
    mac: float
    register: float
    cache: float
    memory: float
    register_accesses: float
    rows: float
    columns: float

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value: Any = getattr(self, field.name)
            least = 1 if field.name in ("rows", "columns") else 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(f"Expected energy.{field.name} to be a number of at least {least}, got {value}.")

    def layer(
        self, macs: int, weights: int, inputs: int, outputs: int, weight_bits: int = FULL, act_bits: int = FULL
    ) -> float:
        """Picojoules of a convolution or FC layer, its sizes in elements."""
        weight, act = weight_bits / FULL, act_bits / FULL
        each = max(weight, act) * (self.mac + self.register_accesses * self.register)
        each += self.cache * (weight / self.rows + act / self.columns)
        moved = weight * weights + act * (inputs + outputs)
        return each * macs + (self.memory + self.cache) * moved

    def branch(self, elements: int) -> float:
        """Nothing more: an early exit's first layer reads the feature, and is charged for it."""
        return 0.0
