"""The command ``sfs-eval``: lm-eval's command line, in a process where the model ``sfs_triton`` is registered."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SfsError, require

if TYPE_CHECKING:  # the module needs lm-eval, whose absence main() reports
    from ..integrations.lm_eval.costs import EvaluationCosts


class RefusedError(SfsError):
    """Options that lm-eval refuses."""


def main() -> None:
    """Entry point of the console script ``sfs-eval``."""
    with ExitStack() as stack:
        try:
            from ..integrations.lm_eval import costs, ranks  # registers the model, or names the missing extra

            stack.callback(ranks.leave)
            _evaluate(costs.ALL_COSTS)
        except SfsError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)
    if os.environ.get("RANK", "0") == "0":
        for model in costs.ALL_COSTS:
            print(model.table())


def _evaluate(all_costs: Sequence[EvaluationCosts]) -> None:
    """Run lm-eval's command line. ``all_costs``: of the models that it creates.

    Raises:
        SfsError: lm-eval refuses a task, file or option before the first answer is decoded: it is missing or
            invalid. Later errors keep their traceback.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging
    from yaml import YAMLError

    setup_logging()
    harness = HarnessCLI()
    args = harness.parse_args()
    include = getattr(args, "include_path", None)
    require(include is None or Path(include).is_dir(), f"include_path={include!r} is not a folder")
    output = getattr(args, "output_path", None)
    _refuse_output(output)
    before = _written(output)
    try:
        harness.execute(args)
    except SfsError:
        raise
    except (ValueError, TypeError, KeyError, OSError, ImportError, YAMLError) as error:
        if any(costs.started for costs in all_costs):
            raise
        logging.getLogger("lm_eval").debug("refused", exc_info=True)
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        faults = [f"lm-eval: {kind}{error}", *_broken(include)]
        raise RefusedError("; ".join(faults) + " (LMEVAL_LOG_LEVEL=DEBUG shows where)") from error
    _check_written(output, _written(output) - before)


def _refuse_output(path: str | None) -> None:
    """Refuse an output path that cannot be written; lm-eval would report it only after the evaluation."""
    if path is None:
        return
    target = Path(path).absolute()
    parent = next(folder for folder in (target, *target.parents) if folder.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK) or parent == target and target.suffix == ".json"
    require(writable, f"output_path={path!r}: {str(parent)!r} is not a folder that can be written to")


def _written(path: str | None) -> set[Path]:
    """Return the result files in lm-eval's output folder."""
    if path is None:
        return set()
    target = Path(path)
    if target.suffix == ".json":
        return {*target.parent.glob(f"{target.stem}_*.json"), *target.parent.glob("samples_*.jsonl")}
    return {*target.rglob("*.json"), *target.rglob("*.jsonl")}


def _check_written(path: str | None, files: set[Path]) -> None:
    """Remove partially written result files, for which lm-eval only logs that they could not be saved.

    Raises:
        RefusedError: there was a partial file, or no file was written.
    """
    partial = [file for file in sorted(files) if not _is_complete(file)]
    for file in partial:
        file.unlink()
    if partial or path is not None and os.environ.get("RANK", "0") == "0" and not files:
        raise RefusedError(f"output_path={path!r}: the results could not be written; is the disk full?")


def _is_complete(file: Path) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
        for document in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(document)
    except ValueError:
        return False
    return True


def _broken(folder: str | None) -> Iterator[str]:
    """Yield the faults of task files in a folder, which lm-eval silently ignores."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            load_yaml(path, resolve_func=False)
        except (ValueError, OSError, YAMLError) as error:
            yield f"{path} cannot be read: {error}"


if __name__ == "__main__":
    main()
