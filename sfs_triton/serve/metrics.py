"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .scheduler import Scheduler, Watch

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics(Watch):
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def make(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options):
            return kind(f"sfs_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "http_requests", "Answers, by route and status", ("route", "status"))
        self.seconds = make(Histogram, "http_seconds", "From a request to its end", ("route",), buckets=_SECONDS)
        self._ended = make(Counter, "generations", "Generations that are over, by how they ended", ("how",))
        self._batches = make(Counter, "batches", "Batches that were started")
        self._rows = make(Histogram, "batch_rows", "Rows of a batch at its begin", buckets=(1, 2, 4, 8, 16, 32, 64))
        self._steps = make(Counter, "steps", "Steps of all batches")
        self._row_steps = make(Counter, "row_steps", "Steps of all rows")
        self._tokens = make(Counter, "tokens", "Tokens of finished answers")
        self._nfe = make(Counter, "nfe", "Steps of finished answers")
        self._waiting = make(Gauge, "waiting_requests", "Requests in the queue")
        self._running = make(Gauge, "running_rows", "Rows of the batch that runs")

    def follow(self, scheduler: Scheduler) -> None:
        """Read the gauges from a scheduler whenever they are asked for."""
        self._waiting.set_function(lambda: scheduler.waiting)
        self._running.set_function(lambda: scheduler.running)

    def batch(self, rows: int) -> None:
        self._batches.inc()
        self._rows.observe(rows)

    def step(self, rows: int) -> None:
        self._steps.inc()
        self._row_steps.inc(rows)

    def ended(self, how: str, tokens: int, nfe: int) -> None:
        self._ended.labels(how).inc()
        self._tokens.inc(tokens)
        self._nfe.inc(nfe)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)
