"""Settings of a server."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from ..decoding.caching import CachePolicy, NoCache
from ..decoding.samplers import Sampler, SlowFast
from ..errors import check_integer, require

KEY_LENGTH = 8  # minimum characters of an API key
LARGEST = {"max_batch": 1024, "max_batches": 64}  # slots are allocated at the start


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits, defaults and access of a server.

    Args:
        model: the model name in requests.
        host, port: listen address. Anything but loopback needs an ``api_key``, or ``without_key``.
        api_key: bearer token that clients must send; None: no key is needed.
        allowed_hosts: accepted ``Host`` headers besides those of loopback, for a server that listens on loopback.
        sampler, cache: defaults for requests that set none; the temperature is always the request's.
        default_tokens, max_tokens: default and maximum number of response positions (None: limited by the model's
            context only).
        max_batch: sequences per persistent batch, which share a batch key.
        max_batches: maximum number of persistent batches, one per batch key or canvas length.
        cache_memory: maximum bytes of caches and canvases. None: on a CPU half of the memory that is free when the
            server starts, on a GPU its free memory.
        max_queue: maximum number of waiting requests; more are refused with 429.
        time_limit: maximum seconds from a request's arrival to its end.
        max_body, body_seconds: maximum size of a request's body in bytes, and maximum seconds to receive it.
        grace: seconds for running and waiting requests to finish when the server stops.
    """

    model: str = "embedded"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    without_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    sampler: Sampler = field(default_factory=SlowFast)
    cache: CachePolicy = field(default_factory=NoCache)
    default_tokens: int = 128
    max_tokens: int | None = None
    max_batch: int = 8
    max_batches: int = 4
    cache_memory: int | None = None
    max_queue: int = 64
    time_limit: float = 300.0
    max_body: int = 1 << 20
    body_seconds: float = 20.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        least = {"default_tokens": 1, "max_batch": 1, "max_batches": 1, "max_queue": 1, "max_body": 1024}
        optional = {name: 1 for name in ("max_tokens", "cache_memory") if getattr(self, name) is not None}
        for name, smallest in {**least, **optional}.items():
            check_integer(name, getattr(self, name), smallest, LARGEST.get(name))
        for name in ("time_limit", "body_seconds", "grace"):
            value = getattr(self, name)
            fine = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            require(fine, f"{name}={value!r} is not a positive number of seconds")
        check_integer("port", self.port, 0, 65535)
        require(bool(self.model) and self.model.isprintable(), f"model={self.model!r} is not a printable name")
        key = self.api_key
        fine = key is None or len(key) >= KEY_LENGTH and key.isascii() and key.isprintable() and " " not in key
        require(fine, f"the API key is not {KEY_LENGTH} or more printable ASCII characters without a space")
        require(
            self.loopback or key is not None or self.without_key,
            f"host={self.host!r} can be reached from other machines: set an API key, or accept requests "
            "without one (--without-key)",
        )

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name, or "" for all addresses
            return False

    def knows_host(self, header: str) -> bool:
        """Return whether a request may have this ``Host`` header.

        In a DNS rebinding attack a foreign name resolves to loopback, but the browser still sends that name.
        """
        name = header[: header.rfind("]") + 1] if header.startswith("[") else header.partition(":")[0]
        ours = {"localhost", "127.0.0.1", "[::1]", self.host, f"[{self.host}]", *self.allowed_hosts}
        return not self.loopback or name.lower() in {known.lower() for known in ours}
