"""Bytes that a device sends for an image that it leaves to the server."""

from __future__ import annotations

import math

from costs.network import NetworkCosts
from networks.early_exit_network import EarlyExitNetwork
from networks.gate_designs import RecurrentGate


def sent_bytes(network: EarlyExitNetwork) -> NetworkCosts:
    """The bytes of an image that crosses the cut, as a cost like others (``sent_bytes``); all zero without a cut.

    With a codec they are its payload, exactly. Without, the feature is sent in fp32, and with it the state of recurrent
    gates.
    """
    nothing = (0,) * len(network.chain.blocks)
    link = 0
    if network.codec is not None:
        link = network.codec.payload_bytes
    elif network.cut is not None:
        link = 4 * (math.prod(network.chain.tap_shapes()[network.cut]) + _state_size(network))
    cut = None if network.codec is None else network.codec.cut
    return NetworkCosts("sent_bytes", 0, nothing, (0,) * network.num_exits, network.taps, cut=cut, link=link)


def _state_size(network: EarlyExitNetwork) -> int:
    """Numbers that the recurrent gates know of an image: those of an LSTM's output and of its cell."""
    gates = [] if network.gating is None else [network.gating.layer, network.gating.channel]
    return sum(2 * gate.hidden for gate in gates if isinstance(gate, RecurrentGate))
