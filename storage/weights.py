"""Trained weights as safetensors, which hold tensors and nothing that could be executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from storage.files import written_aside

NAME = "network.safetensors"


def write_weights(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a state dict."""
    with written_aside(path) as file:
        file.write(save({name: value.detach().contiguous().cpu() for name, value in state.items()}))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, from a file or from ``network.safetensors`` of a run directory.

    Raises:
        OSError: there is no such file.
        ValueError: a file of another kind, such as a pickle, which is not opened, or one that is not whole.
    """
    path = Path(path).expanduser()
    file = path / NAME if path.is_dir() else path
    try:
        return load(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected weights in {file}, there is no such file.") from None
    except SafetensorError as error:
        raise ValueError(
            f"Expected weights in the safetensors format in {file}, got another kind of file or a damaged one "
            f"({error}). "
            "Pickled weights (.pt, .pth, .ckpt) are never opened, since opening one can run any program."
        ) from error


def start_from(network: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads the backbone (``chain.…``), and of the other parts those tensors that fit.

    Returns:
        Names of the parts' tensors that keep their fresh values.

    Raises:
        ValueError: another backbone's weights.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    backbone = {name for name in (*own, *weights) if name.startswith("chain.")}
    if wrong := sorted(backbone - fitting.keys()):
        raise ValueError(
            f"Expected {source} to hold the weights of this backbone; {len(wrong)} tensors are missing, left over "
            f"or of another shape, {wrong[0]} first. Choose the backbone, precision and data set it was trained "
            "with."
        )
    network.load_state_dict(fitting, strict=False)
    return sorted(own.keys() - fitting.keys())
