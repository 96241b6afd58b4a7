"""torchvision's models, with or without the weights torchvision publishes for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from networks.chain import initialize

log = logging.getLogger(__name__)


def torchvision_model(
    name: str, num_classes: int, input_shape: Sequence[int], weights: str | None, first: str, last: str
) -> Any:
    """torchvision's model ``name`` for other images and classes than it was made for.

    Args:
        name: a name torchvision knows.
        num_classes: number of logits; a classifier for another number is replaced by an untrained one.
        input_shape: (C, H, W); the first convolution is replaced where C is not 3.
        weights: a name torchvision knows for this model, such as ``DEFAULT``, or None for a random initialization.
        first, last: dotted names of the model's first convolution and of its classifier.

    Raises:
        ValueError: unknown weights, or weights for images without three channels.
        OSError: the weights could be neither found nor downloaded.
    """
    channels = input_shape[0]
    if weights is not None and channels != 3:
        raise ValueError(f"The weights of {name} are for 3 channels, the images have {channels}; use null.")
    model = torchvision.models.get_model(name) if weights is None else _pretrained(name, weights)
    conv, classifier = model.get_submodule(first), model.get_submodule(last)
    if channels != 3:
        conv = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        initialize(conv)
        model.set_submodule(first, conv)
    if classifier.out_features != num_classes:
        model.set_submodule(last, nn.Linear(classifier.in_features, num_classes))
        if weights is not None:
            log.info(
                "The classifier of %s for %d classes starts untrained, the rest from %s.", name, num_classes, weights
            )
    return model


def _pretrained(name: str, weights: str) -> Any:
    known = torchvision.models.get_model_weights(name)
    names = ["DEFAULT", *(entry.name for entry in known)]
    if weights not in names:
        raise ValueError(f"Expected weights of {name} to be one of {', '.join(names)} or null, got {weights!r}.")
    entry = known[weights]
    try:
        return torchvision.models.get_model(name, weights=entry)
    except OSError as error:
        target = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
        raise OSError(f"{entry} could not be downloaded ({error}); put it at {target} by hand.") from error
