"""What Prometheus reads at /metrics. Counters of the engine are read when asked for, and cost nothing before."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moespac.engine.engine import Engine, Piece
from moespac.serve.answer import Answer
from moespac.serve.worker import Worker

_FIRST = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
)  # seconds: a cached toy to a cold giant
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SENDING = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1)  # a reader may be slow
_ENDPOINTS = frozenset(
    {"/", "/health", "/metrics", "/api/live", "/v1/models", "/v1/chat/completions", "/v1/completions"}
)


class Metrics:
    """A registry of its own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "moespac_requests", "Requests answered.", ["endpoint", "status"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "moespac_prompt_tokens",
            "Tokens of the prompts of answers that are over.",
            registry=self._registry,
        )
        self._generated = Counter("moespac_generated_tokens", "Tokens generated.", registry=self._registry)
        self._drafted = Counter("moespac_drafted_tokens", "Tokens drafted.", registry=self._registry)
        self._accepted = Counter(
            "moespac_accepted_tokens",
            "Drafted tokens that verification accepted; over drafted: the acceptance.",
            registry=self._registry,
        )
        self._engine_seconds = Counter(
            "moespac_engine_seconds", "Seconds in which the engine worked.", registry=self._registry
        )
        self._first_token = Histogram(
            "moespac_time_to_first_token_seconds",
            "From the request to its first token, waiting in line included.",
            registry=self._registry,
            buckets=_FIRST,
        )
        self._per_token = Histogram(
            "moespac_time_per_token_seconds",
            "Of each answer: seconds a token after the first, turns of other answers included.",
            registry=self._registry,
            buckets=_PER_TOKEN,
        )

        self._sending = Histogram(
            "moespac_stream_seconds",
            "Of each streamed piece: from the engine to the socket.",
            registry=self._registry,
            buckets=_SENDING,
        )

    def watch(self, engine: Engine, worker: Worker) -> None:
        self._registry.register(_EngineCollector(engine, worker))

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def requested(self, path: str, status: int) -> None:
        """Any other path is the client's invention, and would make a series of its own."""
        self._requests.labels(path if path in _ENDPOINTS else "other", str(status)).inc()

    def sent(self, seconds: float) -> None:
        self._sending.observe(seconds)

    # ---- serve.worker.Observer -----------------------------------------------------------------------

    def stepped(self, piece: Piece, seconds: float) -> None:
        self._generated.inc(len(piece.tokens))
        self._drafted.inc(piece.drafted)
        self._accepted.inc(piece.accepted)
        self._engine_seconds.inc(seconds)

    def ended(self, answer: Answer) -> None:
        timing = answer.timing
        self._prompt_tokens.inc(answer.prompt_tokens)
        if timing.first_token is None or timing.last_token is None:
            return
        self._first_token.observe(timing.first_token - timing.asked)
        if answer.tokens > 1:
            self._per_token.observe((timing.last_token - timing.first_token) / (answer.tokens - 1))


class _EngineCollector(Collector):
    """The engine's own counters, as they stand."""

    def __init__(self, engine: Engine, worker: Worker) -> None:
        self._engine = engine
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        runtime = self._engine.runtime
        active = CounterMetricFamily(
            "moespac_active_experts",
            "Experts that decode passes used, by the tier that computed them, and whether they were there.",
            labels=["tier", "result"],
        )
        resident = GaugeMetricFamily("moespac_resident_experts", "Experts in a tier.", labels=["tier"])
        slots = GaugeMetricFamily("moespac_expert_slots", "Experts that a tier can hold.", labels=["tier"])
        for tier in runtime.memory.tiers:
            stats = getattr(runtime.stats, tier.name)
            active.add_metric([tier.name, "hit"], stats.hits)
            active.add_metric([tier.name, "miss"], stats.misses)
            resident.add_metric([tier.name], int(tier.ready.sum()))
            slots.add_metric([tier.name], tier.slots)
        moved = CounterMetricFamily(
            "moespac_read_bytes", "Bytes of experts, from storage and over the link.", labels=["link"]
        )
        for link, nbytes in runtime.memory.bytes_read.items():
            moved.add_metric([link], nbytes)
        requests = GaugeMetricFamily(
            "moespac_open_requests", "Requests that decode or wait.", labels=["state"]
        )
        requests.add_metric(["active"], self._worker.active)
        requests.add_metric(["waiting"], self._worker.waiting)
        passes = CounterMetricFamily("moespac_passes", "Passes of the model.", value=runtime.stats.passes)
        yield from (active, resident, slots, moved, requests, passes)
