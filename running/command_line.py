"""Bad input is answered with one line on standard error and exit status 1. Imports nothing heavy."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from running import sweep
from running.interruption import Stopped, again, end_stopped, stop, stopping

# the user's wish, read before run_main sets it; the processes of a launcher inherit both
SHOW_ALL = "HYDRA_FULL_ERROR" in os.environ and "OFFRAMP_ONE_LINE" not in os.environ
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOSPC}
LOST = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's
EXTRAS = {"submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray"}  # launchers: what installs them


class Refused(Exception):
    """Input that cannot be run, said in one line."""


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Turns what goes wrong while a run is being built from its config into one line.

    Raises:
        Refused: for a value, a file or a combination that cannot work. Anything else passes as it is.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, InstantiationException, OmegaConfBaseException) as error:
        if SHOW_ALL:
            raise
        raise Refused(_reason(error)) from error


def _reason(error: BaseException) -> str:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return _one_line(str(error))


def quiet_libraries() -> None:
    """Silences what libraries say of themselves when they are imported or first used."""
    # torchvision and fvcore still script functions when they are imported; matplotlib tells of its fonts
    warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", FutureWarning)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def run_main(main: Callable[[], None], conf: Path = CONF) -> None:
    """Runs a Hydra entry point; what it refuses ends with status 1 and one line. HYDRA_FULL_ERROR=1 shows all of it.

    Args:
        conf: folder of its config groups.
    """
    if not SHOW_ALL:
        os.environ["OFFRAMP_ONE_LINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises what it would otherwise print over many lines
    try:
        with stopping():
            while _is_to_go_on(main):
                pass
    except Stopped as stopped:
        if folder := sweep.end():
            sweep.report(folder, hint=False)
            end_stopped(stopped, "hydra.sweep.dir", folder)
        end_stopped(stopped)
    except Exception as error:
        reason = _refusal(error, conf)
        if folder := sweep.end():
            sweep.report(folder)
            reason = reason or f"The sweep broke off: {type(error).__name__}: {_one_line(str(error))}"
        if SHOW_ALL or reason is None:
            raise
        stop(reason)


def _is_to_go_on(main: Callable[[], None]) -> bool:
    """Runs ``main``; gives whether it was a sweep of which a job's process was killed.

    With that process joblib loses all the jobs that it has not finished, so the sweep is begun again. That comes to an
    end: see ``running.jobs`` for a job that is killed a second time.
    """
    try:
        main()
    except Exception as error:
        if sweep.running is None or type(error).__name__ not in LOST:
            raise
        print(f"A job's process was killed ({type(error).__name__}); going on with what is missing.", flush=True)
        sys.argv = shlex.split(again("hydra.sweep.dir", sweep.end() or ""))[1:]
        sweep.going_on = True
        return True
    return False


def _refusal(error: Exception, conf: Path) -> str | None:
    """One line for what Hydra itself refuses, None for anything else."""
    if isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return _composition(error, conf)
    text = _one_line(str(error))
    if isinstance(error, ValueError) and text.startswith("Config group override"):  # group=null
        return text
    if isinstance(error, OSError) and error.filename and error.errno in UNWRITABLE:  # the run's folder
        return f"Cannot write to {error.filename}: {error.strerror}; choose another hydra.run.dir or hydra.sweep.dir."
    return None


def _composition(error: Exception, conf: Path) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice in EXTRAS:
            return f"{group}={choice} needs a package: pip install '.[{EXTRAS[choice]}]'"
        known = _choices(conf / group) or sorted(error.options or [])
        return f"{group}={choice} is not an option; {group} is one of {', '.join(known)}."
    text = str(error)
    if isinstance(error, ConfigCompositionException) and (key := re.search(r"Could not override '([^'@]+)", text)):
        near = _nearest(key[1], error.__cause__, conf)
        return f"There is no key {key[1]!r}{near}. --cfg job prints all keys, --help the groups."
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text} {error.__cause__}"
    return _one_line(text)


def _choices(group: Path) -> list[str]:
    files = [path.relative_to(group).with_suffix("") for path in group.rglob("*.yaml")]
    return sorted(str(file) for file in files if not file.name.startswith("_"))


def _nearest(key: str, cause: BaseException | None, conf: Path) -> str:
    """A suggestion for a mistyped key, from the node it was looked for in, the top-level keys and the groups."""
    _, _, last = key.rpartition(".")
    top = [name for file in conf.glob("*.yaml") for name in re.findall(r"^(\w+):", file.read_text(), re.M)]
    names = {name: name for name in top + [str(path.relative_to(conf)) for path in conf.rglob("*") if path.is_dir()]}
    node = getattr(cause, "parent_node", None)
    if isinstance(node, DictConfig):
        prefix = str(node._get_full_key("")).rstrip(".")
        names |= {str(name): ".".join(filter(None, (prefix, str(name)))) for name in node}
    matches = difflib.get_close_matches(last, names, n=1)
    return f"; the nearest is {names[matches[0]]!r}" if matches else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
