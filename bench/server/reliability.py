"""Renders the figures of ``docs/reliability.md`` from the records: ``python -m bench.server.reliability``.

Records are the newest ``*-soak.json``, ``*-determinism.json``, ``*-serve-load.json`` and ``*-ptx-sm*.json`` below
``bench/results/``. Each fills what is between its markers on the page; the picture is drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench import ROOT
from bench.common.chart import save
from bench.common.pages import marked, replace_file, table

RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "reliability.md"
PICTURE = "soak.png"


def newest(results: Path, name: str) -> tuple[Path, dict]:
    """The record of this kind with the latest date, and where it is.

    Raises:
        ValueError: there is none.
    """
    found = sorted(results.glob(f"*/*-{name}.json"), key=lambda path: path.name)
    if not found:
        raise ValueError(f"{results} has no record *-{name}.json")
    return found[-1], json.loads(found[-1].read_text(encoding="utf-8"))


def _from(path: Path, commit: str | None, root: Path) -> str:
    return f"`{path.relative_to(root).as_posix()}`, commit {commit}"


def soak_part(results: Path) -> str:
    path, record = newest(results, "soak")
    outcomes: dict[str, int] = {}
    for kind in record["outcomes"].values():
        for outcome, number in kind.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + number
    listed = ", ".join(f"{outcome} {number:,}" for outcome, number in sorted(outcomes.items(), key=lambda o: -o[1]))
    rested = [mib for _, mib in record["resident_at_rest_mib"]]
    checks = record["checks"]
    rows = [
        ("time, clients", f"{record['minutes']:g} minutes, {record['clients']} clients"),
        ("requests", f"{record['requests']:,}: {listed}"),
        ("sequences decoded, tokens", f"{record['sequences']:,}, {record['tokens']:,}"),
        ("answers of the server's own fault (5xx but 504)", f"{record['server_errors']}"),
        ("other outcomes than expected", f"{record['failures']}"),
        (
            f"the {record['fixed_requests']} fixed requests, asked again",
            f"{record['fixed_compared']:,} answers, {record['fixed_different']} different",
        ),
        (
            "memory at rest, after each minute",
            f"{min(rested):.0f} to {max(rested):.0f} MiB; {rested[0]:.0f} after the first, {rested[-1]:.0f} at the end",
        ),
        (
            f"its slope after {record['warm_up_minutes']:g} minutes",
            f"{record['slope_mib_per_minute']:+.2f} ± {record['slope_interval']:.2f} MiB per minute; "
            f"the bound is {record['slope_bound']:g}",
        ),
        ("sequences running, requests waiting at the end", f"{record['running_at_end']}, {record['waiting_at_end']}"),
        (
            f"slots taken at once, of {record['slots']}",
            f"{record['slots_taken_first']} at the start, {record['slots_taken_last']} at the end",
        ),
        ("exit code after SIGTERM", f"{record['exit_code']}"),
        ("checks", f"{sum(checks.values())} of {len(checks)} passed" + _failed(checks)),
    ]
    first, last = record["load_averages"]
    note = f"; {record['note']}" if record["note"] else ""
    where = _from(path, record["commit"], results.parent.parent)
    given = "".join(f", {name}={value}" for name, value in record.get("environment", {}).items())
    about = (
        f"{record['machine']}, torch {record['torch']}{given} ({where}{note}). "
        f"The load average was {first[0]:g} at the start and {last[0]:g} at the end."
    )
    wrong = "".join(f"Not as expected: `{text[:160]}`.\n\n" for text in record["first_failures"])
    return f"{table(('', 'found'), rows)}\n\n{wrong}{about}\n\n![{_told(record)}]({PICTURE})\n"


def _failed(checks: dict[str, bool]) -> str:
    failed = [name for name, fine in checks.items() if not fine]
    return f"; failed: {', '.join(failed)}" if failed else ""


def _told(record: dict) -> str:
    return f"Resident memory over {record['minutes']:g} minutes, under load and at rest, with the fitted slope"


def determinism_part(results: Path) -> str:
    path, record = newest(results, "determinism")
    rows = [
        (line["compared"], f"{line['same_tokens']} of {line['answers']}", f"{line['same_steps']}")
        for line in record["lines"]
    ]
    machine = record["machine"]
    about = (
        f"{record['prompts']} prompts, {len(record['settings'])} settings ({'; '.join(record['settings'])}), "
        f"{record['gen_length']} positions; {machine['cpu']}, torch {machine['torch']} "
        f"({_from(path, machine['commit'], results.parent.parent)})."
    )
    head = ("compared with one thread, one prompt at a time", "same tokens", "and at the same steps")
    return f"{table(head, rows)}\n\n{about}\n"


def load_part(results: Path) -> str:
    path, record = newest(results, "serve-load")
    latency = record["latency_s"]
    row = (
        f"{record['clients']}, {record['seconds']:.0f} s",
        f"{record['requests']:,}",
        f"{record['errors']}",
        f"{record['refused_429']}",
        f"{latency['p50']:.2f} s",
        f"{latency['p99']:.2f} s",
        f"{record['tokens_per_second']:,.0f}",
    )
    head = ("clients", "requests", "errors", "refused (429)", "latency p50", "p99", "tokens/s")
    about = f"{record['machine']}, torch {record['torch']} ({_from(path, record['commit'], results.parent.parent)})."
    return f"{table(head, [row])}\n\n{about}\n"


def ptx_part(results: Path) -> str:
    records = {f"sm_{sm}": newest(results, f"ptx-sm{sm}") for sm in (80, 90)}
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for name, (_, record) in records.items():
        for row in record["rows"]:
            found.setdefault((row["operation"], row["dtype"]), {})[name] = row
    rows = []
    for (operation, dtype), each in sorted(found.items()):
        cells = [each.get(name) for name in records]
        numbers = [f"{row['cases']:,}, {row['launches']:,}" if row else "" for row in cells]
        error = max(row["largest_error"] for row in each.values())
        rows.append((operation, dtype, *numbers, f"{error:.0e}" if error else "exact"))
    told = []
    for name, (path, record) in records.items():
        where = _from(path, record["machine"]["commit"], results.parent.parent)
        failed = f"{len(record['failed'])} failed" if record["failed"] else "none failed"
        told.append(
            f"{name}: {sum(record['kernels'].values()):,} launches of {len(record['kernels'])} kernels, each under "
            f"{record['schedules'] + 1} schedules; {failed} ({where})"
        )
    versions = f"{record['machine']['cpu']}, triton {record['versions']['triton']}, torch {record['machine']['torch']}"
    head = ("tests of", "dtype", *(f"{name}: cases, launches" for name in records), "largest error")
    return f"{table(head, rows)}\n\n{'. '.join(told)}. {versions}.\n"


PARTS = {"soak": soak_part, "determinism": determinism_part, "load": load_part, "ptx": ptx_part}


def render(page: str, results: Path = RESULTS) -> str:
    """The page with figures of the newest records."""
    for name, part in PARTS.items():
        page = marked(page, name, part(results))
    return page


def draw(record: dict, path: Path) -> Path:
    """Resident memory along a soak."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axis = figure.subplots()
    rested = {"color": "#0072b2", "marker": "o", "markersize": 4, "label": "at rest, once a minute"}
    loaded = {"color": "#b5b5b5", "linewidth": 1.0, "label": "under load"}
    for name, style in (("resident_under_load_mib", loaded), ("resident_at_rest_mib", rested)):
        x, y = zip(*record[name], strict=True)
        axis.plot([seconds / 60 for seconds in x], y, **style)
    after = record["warm_up_minutes"]
    x, y = zip(*((s / 60, mib) for s, mib in record["resident_at_rest_mib"] if s / 60 >= after), strict=True)
    middle, level, slope = sum(x) / len(x), sum(y) / len(y), record["slope_mib_per_minute"]
    ends = (x[0], x[-1])
    label = f"fitted: {slope:+.2f} MiB per minute (bound {record['slope_bound']:g})"
    axis.plot(ends, [level + slope * (end - middle) for end in ends], color="#d95f02", linewidth=2, label=label)
    axis.axvspan(0, after, color="#f0f0f0", zorder=0)
    axis.text(
        after / 2, 0.03, "warm-up", transform=axis.get_xaxis_transform(), ha="center", fontsize=9, color="#666666"
    )
    axis.set_ylim(0, 1.15 * max(mib for _, mib in record["resident_under_load_mib"]))
    axis.set_xlim(0, record["resident_under_load_mib"][-1][0] / 60)
    axis.set_xlabel("minutes")
    axis.set_ylabel("resident memory of the server, MiB")
    axis.legend(loc="lower right", frameon=False, fontsize=9)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is not current")
    options = parser.parse_args(argv)
    try:
        old = options.page.read_text(encoding="utf-8")
        new = render(old, options.results.resolve())
        if not options.check:
            replace_file(options.page, new)
            draw(newest(options.results, "soak")[1], options.page.parent / PICTURE)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = "written" if not options.check else "current" if old == new else "not current"
    print(f"{options.page} is {told}")
    return int(options.check and old != new)


if __name__ == "__main__":
    sys.exit(main())
