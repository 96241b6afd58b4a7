"""Operating points in plain numbers and words, for files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from inference.policies import FixedExit, Never, Patience, Policy
from inference.predicted import Predicted
from inference.thresholds import Confidence, Entropy, Margin

FAMILIES: dict[str, type[Policy]] = {
    family.name: family for family in (Confidence, Margin, Entropy, Predicted, Patience, FixedExit, Never)
}


def to_plain(policy: Policy) -> dict[str, Any]:
    """Name and thresholds of a policy without a budget, infinity as ``"inf"``, which JSON has not."""
    return {name: _plain(value) for name, value in policy.describe().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def from_plain(content: Mapping[str, Any]) -> Policy:
    """The policy again.

    Raises:
        ValueError: no policy of that name, or other thresholds than it has.
    """
    try:
        values = {name: _number(value) for name, value in content.items() if name != "policy"}
        return FAMILIES[content["policy"]](**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected an operating point, got {content}.") from error


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return float(value) if value == "inf" else value
