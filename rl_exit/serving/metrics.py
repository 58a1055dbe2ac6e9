"""What Prometheus is told: requests, exit layers, latency, queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
RECENT = 10.0  # seconds over which the rate of tokens is taken
STALE = 60.0  # seconds after which a replica that has not spoken is no longer shown


class RequestMetrics:
    """What every server counts, in a registry of its own.

    Attributes:
        registry: Where further metrics are made.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: Any = {"registry": self.registry}
        self.requests = Counter("rl_exit_requests", "Requests answered.", ("path", "status"), **made)
        self.seconds = Histogram(
            "rl_exit_request_seconds", "From a request's arrival to its answer.", ("path",), buckets=SECONDS, **made
        )
        self.inside = Gauge("rl_exit_texts_inside", "Texts that were let in and are not answered.", **made)
        self.retries = Counter("rl_exit_retries", "Requests given to another replica because theirs died.", **made)
        self._seen: dict[str, float] = {}

    def replica(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep what a replica last said; forget those that say nothing any more."""
        now = time.monotonic()
        self._seen[name] = now
        self._show(name, state)
        for gone in [other for other, at in self._seen.items() if now - at > STALE]:
            del self._seen[gone]
            self._hide(gone)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _show(self, name: str, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _hide(self, name: str) -> None:
        raise NotImplementedError

    def _gauges(self, words: Mapping[str, str]) -> dict[str, Gauge]:
        """A gauge of every replica for each word of its state."""
        made: Any = {"registry": self.registry}
        return {key: Gauge(f"rl_exit_replica_{key}", text, ("replica",), **made) for key, text in words.items()}


class Metrics(RequestMetrics):
    """The metrics of a server of a classifier.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        made: Any = {"registry": self.registry}
        self.num_layers = num_layers
        self.exit_layer = Counter("rl_exit_texts_left", "Texts by the layer at which they left.", ("layer",), **made)
        self.text_seconds = Histogram(
            "rl_exit_text_seconds", "Time of a text in the model, waiting included.", buckets=SECONDS, **made
        )
        self.lines = Gauge("rl_exit_lines", "Models that are asked straight, past Ray.", **made)
        self.waiting = Gauge("rl_exit_texts_waiting", "Texts that wait for a layer.", ("replica", "layer"), **made)
        self.done = self._gauges(
            {
                "steps": "Layers run since the replica began.",
                "rows": "Texts in these steps; rows / steps is the mean batch.",
                "tokens": "Tokens computed in these steps, padding among them.",
                "real_tokens": "Tokens in these steps without padding.",
                "late": "Requests longer in the model than the goal (--goal-ms), given up ones too; 0 without one.",
            }
        )
        for layer in range(1, num_layers + 1):
            self.exit_layer.labels(str(layer))

    def answered(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Count answers by layer and time."""
        for answer in answers:
            self.exit_layer.labels(str(answer["exit_layer"])).inc()
            self.text_seconds.observe(answer["milliseconds"] / 1000)

    def _show(self, name: str, state: Mapping[str, Any]) -> None:
        for layer, count in enumerate(state["waiting"], start=1):
            self.waiting.labels(name, str(layer)).set(count)
        for key, gauge in self.done.items():
            gauge.labels(name).set(state[key])

    def _hide(self, name: str) -> None:
        for gauge in self.done.values():
            gauge.remove(name)
        for layer in range(1, self.num_layers + 1):
            self.waiting.remove(name, str(layer))


class WritingMetrics(RequestMetrics):
    """The metrics of a server of a decoder.

    Args:
        num_layers: L.
        clock: Seconds, rising.
    """

    def __init__(self, num_layers: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        made: Any = {"registry": self.registry}
        self.exit_layer = Counter("rl_exit_tokens", "Tokens by the layer at which they left.", ("layer",), **made)
        self.first_token = Histogram(
            "rl_exit_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS, **made
        )
        self.rate = Gauge("rl_exit_tokens_per_second", f"Tokens of the last {RECENT:g} seconds, per second.", **made)
        self.states = self._gauges(
            {
                "waiting": "Texts that wait for a row.",
                "writing": "Texts that are being written.",
                "steps": "Steps since the replica began; one writes a token of every text inside.",
                "tokens": "Tokens written since the replica began.",
                "prompt_tokens": "Tokens of prompts that were read.",
                "layers": "Layers run in these steps.",
                "row_layers": "Rows in these layers; row_layers / layers is the mean batch of a layer.",
            }
        )
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        for layer in range(1, num_layers + 1):
            self.exit_layer.labels(str(layer))

    def written(self, tokens: Sequence[Mapping[str, Any]]) -> None:
        """Count tokens by layer, and for the rate."""
        for token in tokens:
            self.exit_layer.labels(str(token["exit_layer"])).inc()
        self._recent.append((self._clock(), len(tokens)))
        self._forget()

    def text(self) -> bytes:
        """The Prometheus text format."""
        self._forget()
        self.rate.set(sum(count for _, count in self._recent) / RECENT)
        return super().text()

    def _forget(self) -> None:
        since = self._clock() - RECENT
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()

    def _show(self, name: str, state: Mapping[str, Any]) -> None:
        for key, gauge in self.states.items():
            gauge.labels(name).set(state[key])

    def _hide(self, name: str) -> None:
        for gauge in self.states.values():
            gauge.remove(name)
