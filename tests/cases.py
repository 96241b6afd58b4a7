"""One row a method: the smallest command that exercises it. Tests over methods run over this table."""

from __future__ import annotations

from pathlib import Path

METHODS: dict[str, list[str]] = {
    "plain": ["method=plain"],
    "early_exit": ["method=early_exit"],
    "exit_predictor": ["method=exit_predictor", "method.phases.choose.choice.points=100"],
    "feature_codec": ["method=feature_codec", "method/predictor=proposed", "method.phases.choose.choice.points=100"],
    "hybrid": ["method=hybrid"],
    "ddi": ["method=ddi"],
    "iadi": ["method=iadi", "method.target_saving=null"],
    "skipnet": ["method=skipnet", "method.resource=energy"],
    "early_exit_separate": ["method=early_exit", "method/phases=separate", "method/heads=light"],
}
PRECISIONS = ("fp32", "w8a8", "w4a4", "w2a2", "w1a1")
BACKBONES = ("resnet8", "vgg16_bn", "alexnet", "densenet76")
SMALL = ["debug=fast", "dataset.batch_size=16", "trainer.accelerator=cpu", "trainer.precision=32-true"]

# methods whose blocks are skipped, and backbones with nothing that remains of a skipped block
GATED = ("ddi", "iadi", "skipnet")
WITHOUT_SHORTCUTS = ("vgg16_bn", "alexnet")

# methods that need a finished run of another one to start from
FROM_RUN: dict[str, str] = {"pruning": "early_exit"}

_named = {path.stem for path in (Path(__file__).parents[1] / "conf/method").glob("*.yaml") if path.stem[0] != "_"}
_tested = {command[0].removeprefix("method=") for command in METHODS.values()} | FROM_RUN.keys()
if missing := _named - _tested:
    raise AssertionError(f"Add a row to METHODS for {', '.join(sorted(missing))}.")
