"""Program that renders chat templates; :mod:`sfs_triton.text.chat_template` starts it, and nothing else does.

It imports only the standard library and jinja2. It reads one line of JSON per conversation and writes one line back.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment


def limit_memory(allowed: int) -> None:
    """Limit address space to ``allowed`` bytes and forbid writing to files. Only Linux enforces it."""
    if sys.platform != "linux":
        return
    import resource

    for kind, most in ((resource.RLIMIT_AS, allowed), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def raise_exception(message: str) -> None:
    raise ValueError(message)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def rendered(source: str, variables: dict[str, Any], most: int) -> str:
    """Render a template to text.

    Raises:
        ValueError: it is longer than ``most`` characters.
    """
    pieces, length = [], 0
    for piece in compiled(source).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise ValueError(f"it wrote more than {most} characters")
    return "".join(pieces)


def answer(line: str) -> str:
    try:
        return json.dumps({"text": rendered(**json.loads(line))})
    except MemoryError:
        return json.dumps({"error": "it ran out of memory"})
    except Exception as error:  # an untrusted template may raise anything
        return json.dumps({"error": str(error) or type(error).__name__})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent process
    limit_memory(int(sys.argv[1]))
    print(flush=True)  # ready
    for line in sys.stdin:
        print(answer(line), flush=True)


if __name__ == "__main__":
    main()
