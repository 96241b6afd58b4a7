"""Checkpoints and weights that are damaged, or no such thing: named, refused and never executed."""

from __future__ import annotations

import pickle
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from running.command_line import Refused
from storage.checkpoints import DamagedCheckpoint, previous, unsealed
from storage.weights import read_weights
from tests.test_interruptions import TINY
from tests.test_runs import run, same, weights_of


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """A run of two epochs, as if it had been stopped before its end."""
    folder = tmp_path_factory.mktemp("two")
    run(folder, *TINY, "epochs=2")
    for name in ("metrics.json", "network.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def stopped(two_epochs, tmp_path) -> Path:
    subprocess.run(["cp", "-a", f"{two_epochs}/.", tmp_path], check=True)
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped"])
def test_a_damaged_checkpoint_is_detected_wherever_the_damage_is(stopped, damage) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    whole = target.read_bytes()
    random = np.random.default_rng(0)
    detected = 0
    for place in random.integers(0, len(whole), 100):
        changed = bytearray(whole[:place] if damage == "truncated" else whole)
        if damage != "truncated":
            changed[place] ^= 1 << random.integers(8)
        target.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=str(target)):
            unsealed(target)
        detected += 1
    assert detected == 100
    target.write_bytes(whole)
    assert torch.load(target, weights_only=True)["state_dict"].keys()  # others read it too


def test_a_damaged_checkpoint_is_refused_before_data_is_read_and_the_one_before_goes_on(stopped, monkeypatch) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    whole = weights_of_checkpoint(stopped)
    target.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.digits.Digits.load", lambda self: pytest.fail("data was read"))
        with pytest.raises(Refused) as error:
            run(stopped, *TINY, "epochs=2")
    offered = re.fullmatch(rf"{target} is damaged, or no checkpoint of Offramp; .* with: (mv .*)", str(error.value))
    assert offered, error.value
    subprocess.run(shlex.split(offered[1]), check=True)
    run(stopped, *TINY, "epochs=2")
    assert same(weights_of(stopped), whole)


def weights_of_checkpoint(stopped: Path) -> dict[str, torch.Tensor]:
    state = torch.load(stopped / "checkpoints/joint.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def test_without_a_whole_checkpoint_the_way_out_is_to_begin_again(stopped) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    target.write_bytes(b"half")
    previous(target).write_bytes(b"half")
    with pytest.raises(Refused, match=r"so is joint.previous.ckpt. Delete both to begin that phase again"):
        run(stopped, *TINY, "epochs=2")
    previous(target).unlink()
    with pytest.raises(Refused, match="; delete it to begin that phase again"):
        run(stopped, *TINY, "epochs=2")


class Evil:
    """What a pickle from a stranger may do."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_pickle_in_place_of_a_checkpoint_or_of_weights_is_refused_and_never_executed(stopped, tmp_path) -> None:
    victim, poison = tmp_path / "executed", tmp_path / "weights.pt"
    target = stopped / "checkpoints/joint.ckpt"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Evil(victim))),
        lambda path: torch.save(Evil(victim), path),
    ):
        target.unlink()
        write(target)
        write(poison)
        with pytest.raises(Refused, match=f"{target} is damaged, or no checkpoint of Offramp"):
            run(stopped, *TINY, "epochs=2")
        with pytest.raises(Refused, match=r"in the safetensors format in .*weights.pt, got another kind of file"):
            run(tmp_path / "other", *TINY, f"weights={poison}")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Evil(victim)))
    assert victim.exists()  # it would have been


def test_a_run_starts_from_another_runs_weights(two_epochs, tmp_path) -> None:
    plain, exits = tmp_path / "plain", tmp_path / "exits"
    run(plain, "backbone=resnet8", "method=plain")
    run(exits, *TINY, f"weights={plain}", "optimizer.lr=0", "scheduler=constant")
    old, new = weights_of(plain), weights_of(exits)
    trained = [name for name in old if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(old[name], new[name]) for name in trained)
    assert any(name.startswith("heads.") for name in new)
    with pytest.raises(
        Refused, match=r"to hold the weights of this backbone; \d+ tensors are missing, left over or of"
    ):
        run(tmp_path / "deeper", "backbone=resnet14", "method=plain", f"weights={plain}/network.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_weights(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="another kind of file or a damaged one"):
        read_weights(tmp_path / "torn.safetensors")


def test_the_weights_a_run_leaves_are_its_last_checkpoints(stopped) -> None:
    run(stopped, *TINY, "epochs=2")
    assert same(load_file(stopped / "network.safetensors"), weights_of_checkpoint(stopped))
