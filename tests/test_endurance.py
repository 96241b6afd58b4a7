"""Runs that are killed again and again, and runs that are long: the measurements behind the README's figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import growth, kills


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_one_left_alone(tmp_path) -> None:
    starts = kills.killed(tmp_path / "killed", 10, kills.left_alone(tmp_path / "alone"), seed=1)
    assert [start.killed for start in starts] == [True] * 10 + [False]
    assert kills.same_results(tmp_path / "alone", tmp_path / "killed")
    assert not kills.same_results(tmp_path / "alone", kills_changed(tmp_path / "killed"))


def kills_changed(folder):
    """The same run with one weight changed by its last bit: the comparison sees it."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "network.safetensors")
    name = next(name for name in state if name.endswith("weight"))
    state[name].view(-1)[0] = float(np.nextafter(np.float32(state[name].view(-1)[0]), np.float32(9)))
    save_file(state, folder / "network.safetensors")
    return folder


@pytest.mark.slow
def test_two_hundred_epochs_grow_nothing(tmp_path) -> None:
    seen = growth.measured(200, tmp_path)
    assert len(seen) == 199
    assert growth.slope([epoch.memory for epoch in seen]) < 50e3  # bytes an epoch; a kept batch would be 200 kB
    assert growth.slope([epoch.handles for epoch in seen]) == 0
    written = np.diff([epoch.log for epoch in seen])
    assert np.ptp(written) < 120  # the digits of twelve numbers
    kept = [epoch.files - epoch.log for epoch in seen[2:]]
    assert max(kept) - min(kept) < 20e3  # checkpoints replace each other
