"""Run the check in this process: a request on stdin, one JSON record per line on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..runner.faults import is_lack_of_memory
from .check import Request, check


def main() -> None:
    """Check, and report an error that ended it as a record."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers print to stdout, too

    def emit(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=out, flush=True)

    try:
        check(Request.from_json(sys.stdin.read()), emit)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        emit({"record": "error", "error": text, "memory": is_lack_of_memory(error)})
        raise


if __name__ == "__main__":
    main()
