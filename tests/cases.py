"""One row a method: the smallest command that exercises it. Tests over methods run over this table."""

from __future__ import annotations

from pathlib import Path

METHODS: dict[str, list[str]] = {
    "plain": ["method=plain"],
    "early_exit": ["method=early_exit"],
    "early_exit_separate": ["method=early_exit", "method/phases=separate", "method/heads=light"],
}
BACKBONES = ("resnet8", "vgg16_bn", "alexnet", "densenet76")
SMALL = ["debug=fast", "dataset.batch_size=16", "trainer.accelerator=cpu", "trainer.precision=32-true"]

_named = {path.stem for path in (Path(__file__).parents[1] / "conf/method").glob("*.yaml") if path.stem[0] != "_"}
_tested = {command[0].removeprefix("method=") for command in METHODS.values()}
if missing := _named - _tested:
    raise AssertionError(f"Add a row to METHODS for {', '.join(sorted(missing))}.")
