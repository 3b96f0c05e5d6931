"""Prometheus metrics of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .worker import EngineObserver, Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics(EngineObserver):
    """Metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def make(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options):
            return kind(f"sfs_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "http_requests", "Responses, by route and status", ("route", "status"))
        self.seconds = make(Histogram, "http_seconds", "Seconds per request, by route", ("route",), buckets=_SECONDS)
        self._ended = make(Counter, "generations", "Finished generations, by outcome", ("how",))
        self._joined = make(Counter, "joined_sequences", "Sequences that got a slot")
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self._sequences = make(Histogram, "step_sequences", "Sequences per step", buckets=sizes)
        self._tokens = make(Counter, "tokens", "Tokens of finished answers")
        self._nfe = make(Counter, "nfe", "Steps of finished answers")
        self._waiting = make(Gauge, "waiting_requests", "Waiting requests")
        self._running = make(Gauge, "running_sequences", "Sequences that have a slot")

    def follow(self, worker: Worker) -> None:
        """Read the gauges from a worker at each scrape."""
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def joined(self) -> None:
        self._joined.inc()

    def step(self, sequences: int) -> None:
        self._sequences.observe(sequences)

    def ended(self, how: str, tokens: int, nfe: int) -> None:
        self._ended.labels(how).inc()
        self._tokens.inc(tokens)
        self._nfe.inc(nfe)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)
