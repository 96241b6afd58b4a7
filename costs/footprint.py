"""How many bytes a device must hold."""

from __future__ import annotations

from networks.early_exit_network import EarlyExitNetwork
from networks.packing import packed_state


def device_bytes(network: EarlyExitNetwork, blocks: int | None = None) -> int:
    """Bytes of what runs on the device, weights of few bits packed: see ``networks.packing``.

    That is all before the cut, the early exits' heads, the Exit Predictor and the codec's encoder; without a cut the
    whole network; gates where their blocks are. Counted are weights, biases, scales and BatchNorm's
    four vectors.

    Args:
        blocks: how many are on the device, where the cut is somewhere else.
    """
    blocks = network.cut if blocks is None else blocks
    rooms: tuple[str, ...] = ("",)
    if blocks is not None:
        own = [f"{room}.{i}." for room in ("chain.blocks", "gating.channel") for i in range(blocks)]
        shared = [
            f"gating.{gate}.{part}" for gate in ("layer", "channel") for part in ("projections", "lstm", "decides")
        ]
        rooms = ("chain.stem.", *own, *shared, "heads.", "predictor.", "codec.encoder.", "codec.limit")
    return sum(
        value.nbytes
        for name, value in packed_state(network).items()
        if name.startswith(rooms) and not name.endswith("num_batches_tracked")
    )
