"""From an evaluation's config to what is to be done, refused where it cannot be."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from costs.energy import Chip, EnergyModel
from costs.hierarchy import Hierarchy
from costs.latency import UNMEASURED, CoInference
from costs.network import network_costs
from evaluation.adaptation_settings import Settings as Adapting
from evaluation.adaptation_settings import Streaming
from evaluation.cost_axes import COSTS, Cost
from evaluation.on_device import Settings
from evaluation.results import Plan
from evaluation.runs import TrainedRun, is_adaptive
from inference.budget import Budget
from inference.policies import Policy
from running.assembly import built
from storage.files import written_aside

FIXED = ("split", "temperature")  # of the node calibration; the others are calibrations


def build_plan(cfg: DictConfig) -> Plan:
    """Policy, calibrations and cost axis.

    Raises:
        ValueError: a value outside its range.
    """
    if cfg.cost not in COSTS:
        raise ValueError(f"Expected cost to be {', '.join(COSTS)}, got {cfg.cost}.")
    for key in ("latency", "retrace", "wandb"):
        if not isinstance(cfg[key], bool):
            raise ValueError(f"Expected {key} to be true or false, got {cfg[key]}.")
    policy: Policy = built(cfg.policy)
    if cfg.budget is not None:
        if isinstance(policy, Budget):
            raise ValueError("policy=budget takes its limit as policy.macs; budget= is for the other policies.")
        policy = Budget(cfg.budget, policy)
    nodes: dict[str, Any] = {str(name): node for name, node in cfg.calibration.items() if name not in FIXED}
    calibrations = {name: built(node) for name, node in nodes.items() if node is not None}
    return Plan(policy, calibrations, cfg.calibration.split, cfg.calibration.temperature, cfg.points, COSTS[cfg.cost])


def build_settings(cfg: DictConfig) -> Settings:
    """What is compared on the device.

    Raises:
        ValueError: a value outside its range.
    """
    node = cfg.on_device
    if not isinstance(node, DictConfig):
        raise ValueError(f"Expected on_device to have lambdas, at and more, got {node}.")
    lambdas = node.lambdas
    return Settings(list(lambdas) if isinstance(lambdas, ListConfig) else lambdas, node.at, node.more)


def chip_of(runs: Sequence[TrainedRun], given: DictConfig | None, cost: Cost) -> EnergyModel | None:
    """What energies are of: the runs' chip, with what is given instead; None where nobody says, or not the same.

    Beside runs with gates all runs are counted on the chip of these.

    Raises:
        ValueError: energies that cannot be; an energy axis without a chip.
    """
    changes = {str(name): value for name, value in (given or {}).items() if value is not None}
    gated = [run for run in runs if run.network.gating is not None]
    stored = [node for run in gated or runs if (node := run.config.get("energy")) is not None]
    if gated and any(run.config.get("energy") != gated[0].config.get("energy") for run in runs):
        print("Energies of all runs are counted on the energy model of the runs with gates.", flush=True)
    kind = Hierarchy if stored and str(stored[0].get("_target_", "")).endswith("Hierarchy") else Chip
    wanted = {field.name for field in fields(kind)} - {"name"}
    if unknown := sorted(changes.keys() - wanted):
        raise ValueError(f"energy.{unknown[0]} is no constant of these runs' energy model, {kind.__name__}.")
    known = [{str(key): node[key] for key in node if key in wanted} | changes for node in stored] or [changes]
    if known[0].keys() == wanted and all(constants == known[0] for constants in known):
        return kind(name="as given" if changes or not stored else stored[0].name, **known[0])
    if cost.whole.kind == "energy_uj" or changes:
        found = "several" if known[0].keys() == wanted else ", ".join(sorted(known[0])) or "none"
        keys = ", ".join(f"energy.{name}" for name in sorted(wanted))
        raise ValueError(f"Expected one chip for all runs, got {found}; give {keys}.")
    return None


def co_inference_of(runs: Sequence[TrainedRun], given: DictConfig | None) -> CoInference:
    """Device, link and server: those of the first run that says, with what is given instead; else the paper's.

    Raises:
        ValueError: a value outside its range.
    """
    changes = {str(name): value for name, value in (given or {}).items() if value is not None}
    known = {field.name for field in fields(CoInference)}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"co_inference.{unknown[0]} is not known; choose from {', '.join(sorted(known - {'name'}))}.")
    stored: Any = next((node for run in runs if (node := run.config.get("co_inference")) is not None), {})
    if {"device_gflops", "convention"} & changes.keys():
        changes["name"] = "as given"
    setting = CoInference(**{str(key): stored[key] for key in stored if key in known} | changes)
    if not setting.measured:
        return setting
    if any(run.network.gating is not None for run in runs):
        raise ValueError(UNMEASURED)
    return replace(setting, name="this machine")


def build_adaptation(cfg: DictConfig) -> Adapting | None:
    """What thresholds that follow the bandwidth are to be, None where they are not asked for.

    Raises:
        ValueError: a value outside its range.
    """
    if cfg.adaptation is None:
        return None
    values: Any = OmegaConf.to_container(cfg.adaptation, resolve=True)
    try:
        stream = Streaming(**values.pop("stream"))
        return Adapting(**values, stream=None if stream.trace is None else stream)
    except TypeError as error:
        raise ValueError(f"adaptation does not take these options: {error}.") from error


def check(runs: Sequence[TrainedRun], plan: Plan) -> None:
    """Whether the policy fits the networks.

    Raises:
        ValueError: no run has an early exit or gates; thresholds of the wrong number or outside their range.
    """
    if not any(is_adaptive(run.network) for run in runs):
        raise ValueError(
            f"Expected a run with early exits, or with gates, {runs[0].path} has none "
            f"(method={runs[0].config.method.name}), so there is nothing to choose; evaluate it beside one that has: "
            "'runs=[<run with exits>,<this one>]'."
        )
    for run in (run for run in runs if run.network.num_exits > 1):
        costs, classes = network_costs(run.network), run.network.chain.num_classes
        careful = plan.policy.at(plan.policy.sequence(classes, costs)[0].tolist())
        try:
            for policy in [careful, plan.policy] if plan.is_point else [careful]:
                policy.check(costs, classes)
        except ValueError as error:
            raise ValueError(f"{run.label}: {error}" if len(runs) > 1 else str(error)) from error


def results_folder(cfg: DictConfig, runs: Sequence[TrainedRun], now: datetime.datetime) -> Path:
    """Where the results go, made.

    Raises:
        OSError: it cannot be written to.
    """
    folder = Path("evaluations") / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")
    if len(runs) == 1:
        folder = runs[0].path / "evaluation"
    if cfg.folder not in (None, "auto"):
        folder = Path(str(cfg.folder)).expanduser()
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        folder /= str(HydraConfig.get().job.num)
    try:
        with written_aside(folder / ".writable"):
            pass
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"Cannot write to {folder}: {error.strerror}; choose another folder=.") from error
    return folder
