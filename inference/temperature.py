"""Calibration of confidences: one temperature an exit, and how far confidence and accuracy are apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from inference.trace import Trace

BINS = 15


def temperatures(trace: Trace) -> list[float]:
    """For each exit the T > 0 with which softmax(z / T) has the least cross-entropy (Guo et al. 2017).

    Searched from 0.05 to 20 on the trace's samples.

    Raises:
        ValueError: fewer than 10 samples.
    """
    if len(trace) < 10:
        raise ValueError(f"Expected at least 10 images to fit temperatures on, got {len(trace)}.")
    return [_temperature(logits.double(), trace.labels) for logits in trace.logits]


def _temperature(logits: Tensor, labels: Tensor) -> float:
    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    return float(math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x))


def calibration_errors(trace: Trace) -> list[float]:
    """Expected calibration error of each exit, from 0 to 1: the mean gap of accuracy and confidence over the bins."""
    tables = [reliability(logits, trace.labels) for logits in trace.logits]
    gaps = [np.nansum(table.counts * np.abs(table.accuracy - table.confidence)) for table in tables]
    return [float(gap / len(trace)) for gap in gaps]


class Reliability(NamedTuple):
    """Samples of one exit by bins of equal width of their confidence; bins without samples have NaN.

    Attributes:
        edges: (bins + 1,).
        counts: (bins,).
        confidence, accuracy: (bins,), averages.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """How often an exit is right, by how sure it is.

    Args:
        logits: (samples, C).
        labels: (samples,).
    """
    confidence, label = (part.numpy() for part in logits.double().softmax(-1).max(-1))
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)  # a bin holds its lower edge, the last both
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, values, bins) / counts for values in (confidence, label == labels.numpy())]
    return Reliability(edges, counts, *means)
