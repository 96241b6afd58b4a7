"""Bad input is answered with one line on standard error and exit status 1. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
)
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

SHOW_ALL = "HYDRA_FULL_ERROR" in os.environ  # the user's, read before run_main sets it
CONF = Path(__file__).parents[1] / "conf"


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


def run_main(main: Callable[[], None]) -> None:
    """Runs a Hydra entry point; what it refuses ends with status 1 and one line. HYDRA_FULL_ERROR=1 shows all of it."""
    # torchvision and fvcore still script functions when they are imported
    warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", FutureWarning)
    if SHOW_ALL:
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises what it would otherwise print over many lines
    try:
        main()
    except (CompactHydraException, OmegaConfBaseException) as error:
        stop(_composition(error))
    except Refused as error:
        stop(str(error))
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's only other refusal: group=null
            raise
        stop(_one_line(str(error)))


def stop(reason: str) -> NoReturn:
    """Says why, in one line, and exits with status 1."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(1)


def end_job(error: Refused) -> NoReturn:
    """Ends a job that was refused: alone with its one line, in a sweep so that the other jobs still run."""
    config = HydraConfig.get()
    _remove_if_empty(Path(config.runtime.output_dir))
    if config.mode == RunMode.MULTIRUN:
        print(f"error in job {config.job.num}: {error}", file=sys.stderr)
        raise error
    stop(str(error))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _composition(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice} is not an option; {group} is one of {', '.join(_choices(group))}."
    text = str(error)
    if isinstance(error, ConfigCompositionException) and (key := re.search(r"Could not override '([^'@]+)", text)):
        near = _nearest(key[1], error.__cause__)
        return f"There is no key {key[1]!r}{near}. --cfg job prints all keys, --help the groups."
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text} {error.__cause__}"
    return _one_line(text)


def _choices(group: str) -> list[str]:
    files = [path.relative_to(CONF / group).with_suffix("") for path in (CONF / group).rglob("*.yaml")]
    return sorted(str(file) for file in files if not file.name.startswith("_"))


def _nearest(key: str, cause: BaseException | None) -> str:
    """A suggestion for a mistyped key, from the node it was looked for in, the top-level keys and the groups."""
    _, _, last = key.rpartition(".")
    top = re.findall(r"^(\w+):", (CONF / "train.yaml").read_text(), re.M)
    names = {name: name for name in top + [str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()]}
    node = getattr(cause, "parent_node", None)
    if isinstance(node, DictConfig):
        prefix = str(node._get_full_key("")).rstrip(".")
        names |= {str(name): ".".join(filter(None, (prefix, str(name)))) for name in node}
    matches = difflib.get_close_matches(last, names, n=1)
    return f"; the nearest is {names[matches[0]]!r}" if matches else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
