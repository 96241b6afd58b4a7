"""torchvision's models with the weights torchvision publishes for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

log = logging.getLogger(__name__)


def torchvision_model(name: str, num_classes: int, input_shape: Sequence[int], weights: str | None) -> Any:
    """torchvision's model ``name``: with 1000 classes where ``weights`` are given, otherwise with ``num_classes``.

    Raises:
        ValueError: weights of a name torchvision does not know, or for images that have not three channels.
        OSError: the weights could be neither found nor downloaded.
    """
    if weights is None:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    known = torchvision.models.get_model_weights(name)
    names = ["DEFAULT", *(entry.name for entry in known)]
    if weights not in names:
        raise ValueError(f"Expected weights of {name} to be one of {', '.join(names)} or null, got {weights!r}.")
    if input_shape[0] != 3:
        raise ValueError(
            f"The weights of {name} are for 3 channels, the images have {input_shape[0]}; use weights=null."
        )
    entry = known[weights]
    try:
        model = torchvision.models.get_model(name, weights=entry)
    except OSError as error:
        target = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
        raise OSError(
            f"The weights {entry} could not be downloaded ({error}); put them at {target} by hand."
        ) from error
    if num_classes != len(entry.meta["categories"]):
        log.info("%s: the classifier for %d classes starts untrained, the rest from %s.", name, num_classes, entry)
    return model
