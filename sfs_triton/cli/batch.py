"""``sfs batch``: answer a file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..batch.run import BatchSettings, run_batch
from ..errors import require


def batch(
    options: Any,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Prompts: .jsonl or .parquet.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Answers: .jsonl or .parquet.", show_default=False)],
    workers: Annotated[int, typer.Option(help="Number of Ray workers; 0 or 1: this process.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch", help="Rows decoded together.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, and replace OUT at the end.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster.", show_default=False)] = None,
) -> None:
    """Answer a file of prompts. A run that was stopped resumes when it is started again."""
    require(workers >= 0, f"--workers {workers} is negative")
    settings = BatchSettings(
        params=options.params(),
        batch=batch_size,
        **{name: getattr(options, name) for name in _SHARED},
    )
    shared = {"overwrite": overwrite, "on_progress": _show_progress if sys.stderr.isatty() else None}
    try:
        if workers > 1 or address is not None:
            from ..integrations import ray

            done = ray.run_batch(source, out, settings, workers=max(1, workers), address=address, **shared)
        else:
            done = run_batch(source, out, settings, **shared)
    except KeyboardInterrupt:
        parts = Path(f"{out}.parts")
        there = f"finished rows are in {parts}, and the same command resumes from there"
        typer.echo(f"\nstopped; {there if parts.exists() else 'no row was finished'}", err=True)
        raise
    kept = f", {done.kept} of them kept from before" if done.kept else ""
    typer.echo(f"wrote {out}: {done.rows} rows{kept}, {done.errors} with an error, in {done.seconds:.1f} s", err=True)


_SHARED = (
    *("model", "device", "dtype", "quantization", "backend", "cuda_graphs", "mask_token_id", "max_length"),
    *("adapter", "apply_chat_template"),
)


def _show_progress(done: int, rows: int) -> None:
    """Show progress on one line of a terminal."""
    print(f"\r{done} of {rows} rows", end="\n" if done >= rows else "", file=sys.stderr, flush=True)
