"""What Prometheus is told: requests, exit layers, latency, queue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STALE = 60.0  # seconds after which a replica that has not spoken is no longer shown


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.registry = CollectorRegistry()
        made: Any = {"registry": self.registry}
        self.requests = Counter("rl_exit_requests", "Requests answered.", ("path", "status"), **made)
        self.seconds = Histogram(
            "rl_exit_request_seconds", "From a request's arrival to its answer.", ("path",), buckets=SECONDS, **made
        )
        self.exit_layer = Counter("rl_exit_texts_left", "Texts by the layer at which they left.", ("layer",), **made)
        self.text_seconds = Histogram(
            "rl_exit_text_seconds", "Time of a text in the model, waiting included.", buckets=SECONDS, **made
        )
        self.inside = Gauge("rl_exit_texts_inside", "Texts that were let in and are not answered.", **made)
        self.retries = Counter("rl_exit_retries", "Requests given to another replica because theirs died.", **made)
        self.waiting = Gauge("rl_exit_texts_waiting", "Texts that wait for a layer.", ("replica", "layer"), **made)
        self.done = {
            name: Gauge(f"rl_exit_replica_{name}", text, ("replica",), **made)
            for name, text in (
                ("steps", "Layers run since the replica began."),
                ("rows", "Texts in these steps; rows / steps is the mean batch."),
                ("tokens", "Tokens in these steps, padding included."),
                ("real_tokens", "Tokens in these steps without padding."),
            )
        }
        for layer in range(1, num_layers + 1):
            self.exit_layer.labels(str(layer))
        self._seen: dict[str, float] = {}

    def answered(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Count answers by layer and time."""
        for answer in answers:
            self.exit_layer.labels(str(answer["exit_layer"])).inc()
            self.text_seconds.observe(answer["milliseconds"] / 1000)

    def replica(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep what a replica last said; forget those that say nothing any more."""
        now = time.monotonic()
        self._seen[name] = now
        for layer, count in enumerate(state["waiting"], start=1):
            self.waiting.labels(name, str(layer)).set(count)
        for key, gauge in self.done.items():
            gauge.labels(name).set(state[key])
        for gone in [other for other, at in self._seen.items() if now - at > STALE]:
            del self._seen[gone]
            for gauge in self.done.values():
                gauge.remove(gone)
            for layer in range(1, len(state["waiting"]) + 1):
                self.waiting.remove(gone, str(layer))

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
