"""Find slime. Its wheel has no train.py, and PyPI's `slime` is another project."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext.errors import UserError

# Where each tested commit differs for us; anything else is said to be untested.
REFERENCE_COMMIT = "8359c9a41c64900dc742f757228318026f88713a"
HEAD_COMMIT = "624b824a8"  # v0.3.1, 2026-08-21
SCRIPTS = ("train.py", "train_async.py")
_FILL = (
    "git clone https://github.com/THUDM/slime third_party/slime, install slime editable, or set "
    "SLIME_PATH to a checkout"
)


@dataclass(frozen=True)
class Checkout:
    """A slime source tree.

    Attributes:
        root: folder with train.py and the package `slime`.
        per_step_batch: whether the loss path takes `step_global_batch_size` (since #990, 2025-12-01);
            without it the commit has the gradient scale that `reduction` mends.
        train_env_vars: whether the command line has `--train-env-vars`.
    """

    root: Path
    per_step_batch: bool
    train_env_vars: bool


def find(environ: Mapping[str, str] = os.environ, repository: Path | None = None) -> Checkout:
    """Return the slime of this environment: SLIME_PATH, third_party/slime, or an installed one.

    Args:
        environ: the environment.
        repository: root of this repository; None when the package runs installed.

    Raises:
        UserError: none found, SLIME_PATH wrong, or PyPI's package of that name.
    """
    stated = environ.get("SLIME_PATH")
    if stated:
        return read(Path(stated), "SLIME_PATH")
    if repository is not None and (repository / "third_party" / "slime" / "train.py").is_file():
        return read(repository / "third_party" / "slime", "third_party/slime")
    spec = importlib.util.find_spec("slime")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise UserError(f"slime is not here: {_FILL}")
    package = Path(places[0])
    if not (package / "backends").is_dir():
        raise UserError(
            f"{package} is PyPI's `slime`, an unrelated statistics package: pip uninstall slime, then "
            + _FILL
        )
    if not (package.parent / "train.py").is_file():
        raise UserError(
            f"slime is installed in {package.parent} without its train.py (its wheel has none): {_FILL}"
        )
    return read(package.parent, "the installed slime")


def read(root: Path, where: str) -> Checkout:
    """Return what the source tree at `root` is.

    Raises:
        UserError: it is not a slime checkout with a Megatron backend.
    """
    loss = root / "slime" / "backends" / "megatron_utils" / "loss.py"
    arguments = root / "slime" / "utils" / "arguments.py"
    for needed in (root / "train.py", loss, arguments):
        if not needed.is_file():
            raise UserError(
                f"{where} = {root} is not a slime checkout: no {needed.relative_to(root)}"
            )
    return Checkout(
        root=root.resolve(),
        per_step_batch="step_global_batch_size" in loss.read_text(),
        train_env_vars='"--train-env-vars"' in arguments.read_text(),
    )
