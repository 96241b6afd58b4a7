"""CIFAR from small archives of its format, checked by torchvision against their checksums and served over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from datamodules import cifar
from datamodules.cifar import Cifar, Unavailable
from tests.conftest import ROOT
from tests.small_cifar import PER_FILE, SMALL, Server, md5

KINDS = pytest.mark.parametrize("classes", [10, 100])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def make(monkeypatch, tmp_path, server):
    """Makes the data set with the small archive's checksums, and the server with the archive as its source."""

    def make(classes: int = 10, root: Path = tmp_path / "data", content: bytes | None = None) -> Cifar:
        small = SMALL[classes]
        server.content = small.archive if content is None else content
        for name, value in (small.attributes | {"url": server.url}).items():
            monkeypatch.setattr(cifar.KINDS[classes], name, value)
        monkeypatch.setitem(cifar.ARCHIVE_BYTES, classes, len(small.archive))
        return Cifar(str(root), classes)

    return make


def refused(data: Cifar) -> str:
    """The one line with which the data set is refused."""
    with pytest.raises(Unavailable) as error:
        data.setup()
    assert "\n" not in str(error.value)
    return str(error.value)


def reads_its_files(data: Cifar) -> bool:
    data.setup()
    small = SMALL[data.num_classes]
    images, labels = data.splits.test.tensors
    np.testing.assert_array_equal(images.reshape(PER_FILE, -1), small.pixels[data.kind.test_list[0][0]])
    assert labels.tolist() == [i % 10 for i in range(PER_FILE)]
    train = {image.numpy().tobytes() for split in (data.splits.train, data.splits.val) for image in split.tensors[0]}
    assert train == {image.tobytes() for name, _ in data.kind.train_list for image in small.pixels[name]}
    return data.class_names == small.names


@KINDS
def test_it_is_downloaded_once_with_progress_and_its_classes_named(make, server, capsys, classes: int) -> None:
    assert reads_its_files(make(classes))
    progress = capsys.readouterr().err
    assert "100%" in progress
    assert "B/s" in progress
    assert {path.name for path in make(classes).root.iterdir()} == {
        cifar.KINDS[classes].filename, cifar.KINDS[classes].base_folder, f".{cifar.KINDS[classes].filename}.lock"
    }  # fmt: skip
    requests = server.requests
    assert reads_its_files(make(classes))
    assert server.requests == requests


def test_without_a_network_it_says_where_to_put_what(make, tmp_path, monkeypatch) -> None:
    data = make()
    monkeypatch.setattr(data.kind, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    said = refused(data)
    assert "could not be downloaded from http://127.0.0.1:9/cifar-10-python.tar.gz (<urlopen error" in said
    assert f"put that file at {tmp_path}/data/cifar-10-python.tar.gz, or use dataset=digits" in said
    (tmp_path / "data/cifar-10-python.tar.gz").write_bytes(SMALL[10].archive)
    assert reads_its_files(data)


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(make, more: bytes) -> None:
    wrong = b"x" * len(SMALL[10].archive) + more
    data = make(content=wrong)
    assert (
        f"(what came has the wrong checksum, expected md5 {md5(SMALL[10].archive)}, got {md5(wrong)}); put"
        in refused(data)
    )
    assert [path.name for path in data.root.iterdir()] == [".cifar-10-python.tar.gz.lock"]
    assert f"(what came is truncated, 99 of {len(SMALL[10].archive)} bytes)" in refused(make(content=b"x" * 99))
    assert reads_its_files(make())


def test_an_archive_that_lies_there_damaged_is_named_and_left_alone(make, server, tmp_path) -> None:
    data, archive, whole = make(), tmp_path / "data/cifar-10-python.tar.gz", SMALL[10].archive
    archive.parent.mkdir()
    wrong = whole[:-9] + b"123456789"
    archive.write_bytes(wrong)
    said = refused(data)
    assert (
        f"{archive} has the wrong checksum, expected md5 {md5(whole)}, got {md5(wrong)}; delete it to download" in said
    )
    archive.write_bytes(whole[:-100])
    assert f"{archive} is truncated, {len(whole) - 100} of {len(whole)} bytes; delete it to download" in refused(data)
    assert archive.read_bytes() == whole[:-100]
    assert server.requests == 0
    archive.unlink()
    assert reads_its_files(data)


@KINDS
@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_damaged_files_are_unpacked_again(make, server, classes: int, which: str) -> None:
    data = make(classes)
    data.setup()
    requests, kind = server.requests, data.kind
    name = {"train": kind.train_list[0][0], "test": kind.test_list[0][0], "meta": kind.meta["filename"]}[which]
    file = data.root / kind.base_folder / name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert reads_its_files(make(classes))
    assert server.requests == requests
    file.unlink()
    data.archive.unlink()
    assert reads_its_files(make(classes))
    assert server.requests > requests


def test_files_that_unpack_damaged_are_named(make, monkeypatch) -> None:
    data = make()
    monkeypatch.setattr(data.kind, "test_list", [["test_batch", "0" * 32]])
    assert f"{data.root}/cifar-10-batches-py/test_batch is damaged after unpacking {data.archive};" in refused(data)


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """The folder is not writable, nor is this process the one user that this does not concern."""
    root.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        root.chmod(0o755)


def test_a_root_that_cannot_be_written_to(make, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(make(root=tmp_path / "file/data"))
    assert f"CIFAR10 is not in dataset.root={tmp_path}/file/data, which cannot be written to ([Errno" in said
    # not below tmp_path, which only its owner may enter
    with tempfile.TemporaryDirectory() as folder:
        data = make(root=Path(folder))
        with read_only(data.root):
            assert f"dataset.root={folder}, which cannot be written to ([Errno 13]" in refused(data)
        assert list(data.root.iterdir()) == []
        assert reads_its_files(data)
        with read_only(data.root):
            assert reads_its_files(make(root=data.root))


# forked before PyTorch starts a thread, so that it is imported once
PROCESSES = """
import json, os, sys
from datamodules import cifar

attributes, archive_bytes, root = json.loads(sys.argv[1])
for name, value in attributes.items():
    setattr(cifar.CIFAR10, name, value)
cifar.ARCHIVE_BYTES[10] = archive_bytes

def start():
    process = os.fork()
    if process == 0:
        try:
            data = cifar.Cifar(root)
            data.setup()
            print(data.splits.test.tensors[0].long().sum().item(), flush=True)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return process

first = start()
print(first, flush=True)
os.waitpid(first, 0)
print(sorted(os.listdir(root)), flush=True)
for process in [start(), start(), start()]:
    os.waitpid(process, 0)
"""


def test_an_interrupted_download_and_processes_that_start_together_disturb_nobody(make, server) -> None:
    data, small = make(), SMALL[10]
    arguments = json.dumps([small.attributes | {"url": server.url}, len(small.archive), str(data.root)])
    server.stall_at = 2  # torchvision asks once for redirections before it reads
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROCESSES, arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    ) as parent:  # fmt: skip
        first = int(parent.stdout.readline())
        assert server.stalled.wait(60)
        aside = data.root / "cifar-10-python.tar.gz.part"
        while not (aside.exists() and aside.stat().st_size):
            assert parent.poll() is None
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        left, *said = parent.stdout.read().splitlines()
    assert left == "['.cifar-10-python.tar.gz.lock', 'cifar-10-python.tar.gz.part']"
    assert said == [str(small.pixels["test_batch"].sum())] * 3
    assert server.requests == 4
    assert reads_its_files(data)


def test_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.num_classes of 10 or 100, got 20"):
        Cifar("data", 20)
