"""Runs in a process of its own, started by :mod:`bench.eval.sandbox`: confines itself, then runs one program.

Reads ``{"program", "nonce", "seconds", "memory", "file", "root"}`` as JSON from stdin. Answers on stdout with one line
once it is confined, and with another when the program has ended; each starts with the nonce, so that a
program that ends the process early has not passed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

# Events of Python's own operations that the program may not cause at all, and those that may only touch its folder.
REFUSED = ("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen")
REFUSED += ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto")
LOCAL = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
LOCAL += ("os.truncate", "os.utime", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Landlock (Linux): rights that the kernel takes away, except below one folder. Numbers are those of linux/landlock.h.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITES = 1, (1 << 1) | sum(1 << bit for bit in range(4, 13))  # writing, removing, making of all kinds
REFER, TRUNCATE = 1 << 13, 1 << 14  # since versions 2 and 3
TCP, SCOPES = 3, 3  # bind and connect; abstract sockets and signals: since versions 4 and 6
NO_NEW_PRIVILEGES = 38


def limit(seconds: float, memory: int, file: int) -> None:
    """Limits that the kernel keeps: processor time, address space, file sizes, open files, core dumps, wall time."""
    cpu = int(seconds) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles it, so it ends the process


def landlock(root: str) -> int:
    """Let the kernel refuse writes outside ``root``, new programs and, where it can, TCP and signals to others.

    Returns the version of Landlock; 0 where the kernel has none.
    """
    import ctypes

    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    version = max(0, libc.syscall(CREATE_RULESET, None, 0, 1))
    if version == 0:
        return 0
    files = EXECUTE | WRITES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = [files, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0][: 1 + (version >= 4) + (version >= 6)]
    ruleset = (ctypes.c_uint64 * len(rules))(*rules)
    handle = libc.syscall(CREATE_RULESET, ruleset, ctypes.sizeof(ruleset), 0)
    folder = os.open(root, os.O_PATH)
    below = (files & ~EXECUTE).to_bytes(8, sys.byteorder) + folder.to_bytes(4, sys.byteorder)  # a packed struct
    steps = (
        handle >= 0,
        libc.syscall(ADD_RULE, handle, 1, below, 0) == 0,
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0,
        libc.syscall(RESTRICT_SELF, handle, 0) == 0,
    )
    if not all(steps):
        raise OSError(ctypes.get_errno(), f"Landlock {version} failed at step {steps.index(False)}")
    os.close(handle)
    os.close(folder)
    return version


def watch(root: str) -> None:
    """Let Python refuse the same things, for kernels that cannot. Holds off accidents, not ill will."""
    inside = os.path.realpath(root) + os.sep

    def check(event: str, arguments: tuple) -> None:
        if event in REFUSED:
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            paths = arguments[:1] if arguments[2] & WRITING else ()
        else:
            paths = arguments[:2] if event in LOCAL else ()
        for path in paths:
            if isinstance(path, (str, bytes)) and not os.path.realpath(os.fsdecode(path)).startswith(inside):
                raise PermissionError(f"{event} of {path!r} is not allowed here")

    sys.addaudithook(check)


def main() -> None:
    order = json.load(sys.stdin)
    nonce = order["nonce"]
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # the program's output is discarded
    version = landlock(order["root"])
    limit(order["seconds"], order["memory"], order["file"])
    watch(order["root"])
    os.write(answer, f"{nonce} begun {version}\n".encode())
    os.dup2(nothing, 2)
    try:
        exec(compile(order["program"], "<program>", "exec"), {})
        verdict = "passed"
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no success either
        verdict = type(error).__name__
    os.write(answer, f"{nonce} {verdict}\n".encode())
    os._exit(0)  # without what the program registered for its exit


if __name__ == "__main__":
    main()
