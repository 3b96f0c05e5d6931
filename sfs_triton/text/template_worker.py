"""Program that renders chat templates; :mod:`sfs_triton.text.chat_template` starts it, and nothing else does.

It imports only the standard library and jinja2. It reads one line of JSON per conversation and writes one line back.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
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


class GenerationTag(Extension):
    """Block ``{% generation %}``, which marks an assistant's text for training: its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body, lineno=line)

    def _content(self, caller: Any) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise ValueError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; jinja's own filter escapes HTML, and sorts keys."""
    how = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, **how)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """Compile a template with what transformers adds to jinja's language."""
    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
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
