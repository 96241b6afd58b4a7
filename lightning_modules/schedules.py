"""Learning-rate schedules that torch does not have."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_then_hold(
    optimizer: Optimizer, total_steps: int, final_lr: float = 1e-4, hold: float = 1 / 11, warmup: float = 0.0
) -> LambdaLR:
    """Cosine annealing from the optimizer's rate to ``final_lr``, which is then held.

    The Exit Predictor paper's schedule: down at epoch 200 of 220, hence ``hold`` = 20/220. (torch's CosineAnnealingLR
    would climb again after its last step.)

    Args:
        optimizer: its learning rate is where the cosine starts.
        total_steps: steps of the phase.
        final_lr: learning rate at the end of the cosine.
        hold: share of the steps, 0 to 1, that stay at ``final_lr``.
        warmup: share of the steps, 0 to 1, over which the rate first rises linearly, below the cosine.

    Raises:
        ValueError: ``hold`` or ``warmup`` outside 0 to below 1.
    """
    for name, share in (("hold", hold), ("warmup", warmup)):
        if not 0 <= share < 1:
            raise ValueError(f"Expected {name} from 0 to below 1, got {share}.")
    falling, rising = total_steps * (1 - hold), total_steps * warmup

    def factor(start: float) -> Callable[[int], float]:
        floor = min(final_lr, start) / start
        return lambda step: (
            min(1.0, (step + 1) / (rising + 1))
            * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, step / falling))) / 2)
        )

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])
