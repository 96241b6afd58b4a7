"""W&B without an account, and what it keeps of a run on disk: protobuf records, framed as LevelDB frames its log."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2 as pb
from wandb.sdk.lib import wbauth

import wandb

BLOCK = 32768


class OfflineRun:
    """One ``.wandb`` file.

    Attributes:
        run: the record of name, group, job type and tags.
        config, summary: by key, nested keys as tuples' last part.
        history: a dict a row, without W&B's own keys.
        axes: the step metric of each metric or pattern that has one.
        artifacts: the records of artifacts.
        exit_code: None where the run was cut off.
    """

    def __init__(self, path: Path):
        self.path, self.run, self.exit_code = path, None, None
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.artifacts: list[Any] = []
        for record in _records(path):
            self._take(record, record.WhichOneof("record_type"))

    def _take(self, record: Any, kind: str) -> None:
        content = getattr(record, kind)
        if kind == "run" and self.run is None:
            self.run = content
            self.config = {item.key: json.loads(item.value_json) for item in content.config.update}
        elif kind == "history":
            self.history.append({name: value for name, value in _items(content.item) if name[0] != "_"})
        elif kind == "summary":
            self.summary |= dict(_items(content.update))
        elif kind == "metric" and content.step_metric:
            self.axes[content.name or content.glob_name] = content.step_metric
        elif kind == "artifact":
            self.artifacts.append(content)
        elif kind == "exit":
            self.exit_code = content.exit_code

    def files(self, pattern: str) -> list[Path]:
        """What was logged as files."""
        return sorted((self.path.parent / "files").glob(pattern))


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """Those of a run directory, oldest first."""
    logs = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return [OfflineRun(log) for log in sorted(logs, key=lambda log: log.stat().st_mtime_ns)]


@contextmanager
def without_account(home: Path) -> Iterator[None]:
    """As on a machine where W&B was never set up: no key, no settings, nothing of an earlier session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        forget()
        yield
        forget()


def forget() -> None:
    """Ends W&B's session in this process; the next one reads the environment anew."""
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


def _items(items: Any) -> Iterator[tuple[str, Any]]:
    for item in items:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def _records(path: Path) -> Iterator[Any]:
    data, at, part = path.read_bytes(), 7, b""  # 7 bytes name the format
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(part)
            yield record
            part = b""
