"""Which rows make up a batch: every row once, the same for any number of processes and workers, new every epoch."""

from __future__ import annotations

from itertools import count

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.image_folder import ImageFolder
from datamodules.sampling import EvaluationBatches, TrainingBatches, epoch_seed


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), processes=st.integers(1, 5), seed=st.integers(0, 9))
def test_processes_together_see_what_one_with_the_whole_batch_sees(rows, batch, processes, seed) -> None:
    if rows < processes:
        with pytest.raises(ValueError, match=f"got {rows} images for {processes} processes"):
            TrainingBatches(rows, batch, lambda: seed, 0, processes)
        return
    shares = [list(TrainingBatches(rows, batch, lambda: seed, rank, processes)) for rank in range(processes)]
    together = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    whole = list(TrainingBatches(rows, batch * processes, lambda: seed))
    if rows >= batch * processes:
        assert len(together) == len(whole) == rows // (batch * processes)
        assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))
    seen = torch.cat(together)
    assert len(seen.unique()) == len(seen) > rows - batch * processes
    assert len({len(part) for share in shares for part in share}) == 1


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), processes=st.integers(1, 5))
def test_evaluation_has_every_row_once_in_as_many_batches_for_each_process(rows, batch, processes) -> None:
    if rows < processes:
        with pytest.raises(ValueError, match=f"got {rows} images for {processes} processes"):
            EvaluationBatches(rows, batch, 0, processes)
        return
    shares = [list(EvaluationBatches(rows, batch, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(torch.cat([part for share in shares for part in share]).tolist()) == list(range(rows))
    sizes = [len(part) for share in shares for part in share]
    assert min(sizes) > 0
    short = rows < -(-rows // (batch * processes)) * processes  # too few rows for a batch each in the last round
    assert max(sizes) <= batch + short
    if processes == 1:
        assert torch.equal(torch.cat(shares[0]), torch.arange(rows))


def test_epochs_phases_runs_and_processes_have_seeds_of_their_own() -> None:
    places = [(run, phase, epoch) for run in range(5) for phase in range(4) for epoch in range(50)]
    seeds = {epoch_seed(*place) for place in places} | {epoch_seed(*place, 1) for place in places}
    assert len(seeds) == 2 * len(places)


def test_keys_give_each_row_of_an_epoch_its_own_seed() -> None:
    epochs = [
        dict(key for batch in TrainingBatches(1000, 10, lambda s=s: s, keyed=True) for key in batch) for s in (1, 2)
    ]
    assert all(len(set(keys.values())) == 1000 for keys in epochs)
    assert not set(epochs[0].values()) & set(epochs[1].values())


class Epochs(pl.LightningModule):
    """Collects the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[list[torch.Tensor]] = []

    def training_step(self, batch, index):
        if index == 0:
            self.batches.append([])
        self.batches[-1].append(batch[0])
        return self.weight.sum()

    def validation_step(self, batch, index) -> None:
        """There is a validation split, so Lightning wants one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def epochs_of(data: ImageFolder, folder, first: int, last: int, checkpoint: str | None) -> list[torch.Tensor]:
    data.begin_phase(3, 0)
    module = Epochs()
    options = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=last, default_root_dir=folder, use_distributed_sampler=False, **options)
    # whatever was drawn before must not matter
    torch.manual_seed(first)
    trainer.fit(module, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "end.ckpt")
    return [torch.cat(batches) for batches in module.batches]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:.*training batches.*logging interval")
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_of_an_epoch_do_not_depend_on_workers_or_on_where_the_run_began(
    make_folder, tmp_path, workers
) -> None:
    root = make_folder(side=30)

    def data(workers: int) -> ImageFolder:
        return ImageFolder(str(root), image_size=24, in_memory=False, batch_size=9, num_workers=workers)

    whole = epochs_of(data(0), tmp_path / "whole", 0, 3, None)
    (tmp_path / "parts").mkdir()
    parts = epochs_of(data(workers), tmp_path / "parts", 1, 2, None)
    parts += epochs_of(data(workers), tmp_path / "parts", 2, 3, str(tmp_path / "parts/end.ckpt"))
    assert len(whole) == len(parts) == 3
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole[0], whole[1])


def test_outside_a_run_every_epoch_is_new() -> None:
    numbers = count()
    batches = TrainingBatches(50, 10, lambda: next(numbers))
    assert not torch.equal(torch.cat(list(batches)), torch.cat(list(batches)))
