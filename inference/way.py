"""What samples go along: a network that computes, or a trace that remembers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Way(Protocol):
    """What the samples go along: a network that computes, or a trace that remembers."""

    def predict(self) -> tuple[Tensor, float]:
        """The Exit Predictor's scores (n, N - 1) float32 of the samples on the way, and its MACs."""

    def advance(self, k: int) -> Tensor | float:
        """Brings all samples on the way to exit k, from 1; gives the MACs of that segment, (n,) or the same for all."""

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Logits (m, C) float32 of head k for the samples ``wanted`` (m,), None for all, and the MACs of it."""

    def keep(self, staying: Tensor) -> None:
        """Leaves only these samples (m,) on the way."""
