"""The Exit Predictor's network against table II of its paper."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from costs.counting import count
from networks.exit_predictor import SeparableStage, fcs_only, lenet, separable
from tests.conftest import stirred

VARIANTS = {
    "proposed": separable,
    "without concatenation and SE": partial(separable, enriched=False),
    "FCs only": fcs_only,
    "LeNet": lenet,
}


@pytest.mark.parametrize(
    ("variant", "published", "exact"),
    [
        ("proposed", 0.40, 398_224),
        ("without concatenation and SE", 0.29, 286_466),
        ("FCs only", 0.39, 393_730),
        ("LeNet", 0.67, 670_370),
    ],
)
def test_operations_are_those_of_table_ii(variant: str, published: float, exact: int) -> None:
    counted = count(VARIANTS[variant](3), torch.zeros(1, 3, 32, 32), convention="ptflops")[""]
    assert counted == exact
    assert round(counted / 1e6, 2) == published


@pytest.mark.parametrize(("enriched", "parameters"), [(True, 59_298), (False, 45_858)])
def test_parameters(enriched: bool, parameters: int) -> None:
    assert sum(p.numel() for p in separable(3, enriched=enriched).parameters()) == parameters


def test_macs_of_the_proposed_network_by_hand() -> None:
    macs = 9 * 3 * 16 * 16**2
    for c, out, side in ((16, 32, 8), (32, 64, 4), (64, 128, 2)):
        macs += 9 * c * side**2 + 2 * (2 * c) * (2 * c // 16) + 2 * c * out * side**2
    macs += 512 * 64 + 64 * 2
    assert count(separable(3), torch.zeros(1, 3, 32, 32))[""] == macs


@settings(max_examples=25)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    exits=st.integers(2, 8),
    channels=st.sampled_from([1, 3]),
    sides=st.tuples(st.integers(16, 70), st.integers(16, 70)),
)
def test_every_variant_scores_every_early_exit_of_images_of_any_size(variant, exits, channels, sides) -> None:
    predictor = stirred(VARIANTS[variant](exits, (channels, *sides)))
    images = torch.randn(3, channels, *sides)
    scores = predictor.scores(images)
    assert scores.shape == (3, exits - 1)
    torch.testing.assert_close(scores, 1 / (1 + torch.exp(-predictor(images))))
    torch.testing.assert_close(scores[1:2], predictor.scores(images[1:2]), atol=1e-5, rtol=1e-4)


def test_a_stage_is_that_of_figure_6() -> None:
    stage, x = stirred(SeparableStage(4, 6)), torch.randn(2, 4, 10, 10)
    conv, norm, _ = stage.depthwise
    deep = F.conv2d(x, conv.weight, stride=2, padding=1, groups=4)
    deep = F.relu(F.batch_norm(deep, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    both = torch.cat([F.max_pool2d(x, 2), deep], 1)
    squeeze, excite = (layer.weight for layer in stage.excitation.layers if isinstance(layer, torch.nn.Linear))
    scale = torch.sigmoid(F.relu(both.mean((2, 3)) @ squeeze.T) @ excite.T)
    expected = torch.einsum("nchw,oc->nohw", both * scale[:, :, None, None], stage.pointwise[0].weight[:, :, 0, 0])
    norm = stage.pointwise[1]
    expected = F.relu(F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    torch.testing.assert_close(stage(x), expected)


def test_what_cannot_be_is_refused() -> None:
    for make in VARIANTS.values():
        with pytest.raises(ValueError, match="Expected a network with an early exit for the Exit Predictor, got 1"):
            make(1)
    with pytest.raises(ValueError, match="at least 16x16"):
        separable(3, (3, 8, 8))
