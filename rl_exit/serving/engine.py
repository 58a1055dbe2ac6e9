"""The model in a thread of its own: texts come in at any time, each is answered when it leaves.

One thread owns the model. It takes what has arrived into the pool, runs the step that the pool chooses, and hands out
the answers of the rows that left, so that an easy text never waits for a hard one that came along.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from rl_exit.criteria import Criterion
from rl_exit.data.instances import Instances
from rl_exit.serving.goal import GoalPool
from rl_exit.serving.pool import PoolRules, RequestPool, Row
from rl_exit.serving.steps import Passage, run_step
from rl_exit.serving.texts import Left

Result = TypeVar("Result")

PACKED_TOKENS = 256  # end to end: attention over so many is a tenth of MiniLM's layer, and grows with the square
RAGGED_TOKENS = 1024  # where only attention is padded; more save nothing any more and make others wait
RAGGED_AREA = 4096  # rows times the longest: at 512 tokens padded attention is then about as dear as the rest


@dataclass
class Counts:
    """What an engine has done since it began; ``tokens`` has the padding that was computed, ``real_tokens`` none;
    ``late``: requests that took longer than the goal, given up ones among them."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    real_tokens: int = 0
    late: int = 0


@dataclass(eq=False, slots=True)
class _Request:
    """Texts that are answered together: one future, so that who waits is woken once."""

    arrived: float
    answer: Future[list[Left]]
    found: dict[int, Left]
    texts: int


@dataclass(eq=False, slots=True)
class _Waiting:
    """A text in the pool, and its place in its request."""

    passage: Passage
    request: _Request
    place: int


@dataclass(eq=False)
class _Job(Generic[Result]):
    work: Callable[[], Result]
    answer: Future[Result]


class PooledEngine:
    """Depth-pooled batching around one model; :meth:`close` ends its thread.

    Args:
        model: An :class:`rl_exit.EarlyExitModel` with its tokenizer; put into evaluation mode.
        rules: Of the pool.
        clock: Seconds, rising.

    Attributes:
        counts: What was done so far.
    """

    def __init__(self, model: Any, rules: PoolRules, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = Counts()
        self._model = model.eval()
        kind: type[RequestPool[_Waiting]] = RequestPool if math.isinf(rules.goal) else GoalPool
        self._pool = kind(model.num_layers, rules)
        self._clock = clock
        self._wake = threading.Condition()
        self._arrived: list[Row[_Waiting]] = []
        self._jobs: list[_Job[Any]] = []
        self._gone: list[_Request] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rl-exit-model", daemon=True)
        self._thread.start()

    def submit(self, instances: Instances, rule: Criterion) -> Future[list[Left]]:
        """Let texts in at layer 1.

        Args:
            instances: N tokenised texts, each of at least one token.
            rule: When they leave. Texts share the memory of a rule only where it is the same object.

        Returns:
            The N answers, in order, once the last text has left. Cancel it, and its texts are dropped before their
            next layer.

        Raises:
            RuntimeError: The engine is closed.
        """
        now = self._clock()
        request = _Request(now, Future(), {}, len(instances))
        rows = []
        ends = zip(instances.offsets[:-1].tolist(), instances.offsets[1:].tolist(), strict=True)
        for place, (start, stop) in enumerate(ends):
            types = None if instances.token_types is None else instances.token_types[start:stop]
            passage = Passage(instances.tokens[start:stop], types, rule)
            rows.append(Row(_Waiting(passage, request, place), length=stop - start, arrived=now, request=request))
        with self._wake:
            self._refuse_if_closed()
            self._pad_token_id = instances.pad_token_id
            self._arrived += rows
            self._wake.notify()
        if not rows:
            request.answer.set_result([])
        request.answer.add_done_callback(lambda answer: self._given_up(request, answer))
        return request.answer

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Do something with the model in its thread, between two steps.

        Raises:
            RuntimeError: The engine is closed.
        """
        job = _Job(work, Future[Result]())
        with self._wake:
            self._refuse_if_closed()
            self._jobs.append(job)
            self._wake.notify()
        return job.answer

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether it takes nothing more."""
        return self._closing

    def waiting(self) -> list[int]:
        """Texts that wait for each layer, [L]; those on their way to layer 1 included."""
        waiting = self._pool.waiting()
        waiting[0] += len(self._arrived)
        return waiting

    def close(self) -> None:
        """Answer what is inside, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closing:
            raise RuntimeError("the engine is closed")

    def _given_up(self, request: _Request, answer: Future[list[Left]]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            with self._wake:
                self._gone.append(request)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._arrived or self._jobs or len(self._pool) or self._closing):
                    self._wake.wait()
                arrived, self._arrived = self._arrived, []
                jobs, self._jobs = self._jobs, []
                gone, self._gone = self._gone, []
            if not (arrived or jobs or len(self._pool)):
                return
            for job in jobs:
                _work(job)
            self._pool.add(arrived, self._clock())
            for request in gone:
                self._pool.drop(request)
                self.counts.late += self._clock() - request.arrived > self._pool.rules.goal
            self._step([row for row in self._pool.take(self._clock()) if not _dropped(row)])

    def _step(self, rows: list[Row[_Waiting]]) -> None:
        if not rows:
            return
        layer, began = rows[0].layer, self._clock()
        try:
            outcome = run_step(self._model, layer, [row.payload.passage for row in rows], self._pad_token_id)
        except Exception as error:  # noqa: BLE001 - whoever waits is told; the thread serves the others
            for row in rows:
                _settle(row.payload.request, error)
            return
        now = self._clock()
        self._pool.ran(rows, layer, len(outcome.left), now - began)
        self.counts.steps += 1
        self.counts.rows += len(rows)
        self.counts.tokens += outcome.tokens
        self.counts.real_tokens += sum(row.length for row in rows)
        staying = [rows[position] for position in outcome.stay]
        for row in staying:
            row.layer = layer + 1
        self._pool.add(staying, now)
        for position, logits in zip(outcome.left, outcome.logits.numpy(), strict=False):
            row = rows[position]
            request = row.payload.request
            request.found[row.payload.place] = Left(logits, layer, now - row.arrived)
            if len(request.found) == request.texts:
                self.counts.late += now - request.arrived > self._pool.rules.goal
                _settle(request)


def measure_rules(model: Any, batch_size: int, deadline: float, goal: float = math.inf) -> PoolRules:
    """Find what a step costs beside its tokens on this machine, and how many tokens a step is best limited to.

    Args:
        model: In evaluation mode.
        batch_size: Most rows in a step.
        deadline: Seconds, as in :class:`rl_exit.serving.pool.PoolRules`.
        goal: Likewise.

    Returns:
        Rules with ``overhead`` and ``batch_tokens`` as measured within about a second. On a CPU, where every token
        costs, and with a backbone that can run rows without padding, their lengths matter little
        (:attr:`.PoolRules.packed_tokens`).
    """
    packed = _packed(model)
    length = min(32, model.max_length)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= batch_size]
    took = {size: min(_time_step(model, size, length) for _ in range(5)) for size in sizes}
    per_row = {size: seconds / size for size, seconds in took.items()}
    best = min(per_row, key=lambda size: per_row[size])
    # Of the sizes that are about as good as the best, the smallest: it makes others wait least.
    enough = next(size for size in sizes if per_row[size] <= 1.05 * per_row[best])
    if best == 1:
        return PoolRules(batch_size, deadline, 0.0, length, *packed, goal)
    # took = a + b * size * length through the single row and the best size.
    slope = (took[best] - took[1]) / (best - 1)
    overhead = max(took[1] - slope, 0.0) / max(slope / length, 1e-9)
    limit = enough * length if enough < sizes[-1] else batch_size * model.max_length
    return PoolRules(batch_size, deadline, overhead, limit, *packed, goal)


@torch.inference_mode()
def _packed(model: Any) -> tuple[int, float]:
    """How many tokens run at once without padding, 0: none do; and at most how many with what attention pads."""
    probe = model.backbone.begin(torch.full((1, 1), model.config.pad_token_id or 0, device=model.device))
    if all(model.backbone.drops_padding(layer, probe) for layer in range(1, model.num_layers + 1)):
        return RAGGED_TOKENS, RAGGED_AREA
    return PACKED_TOKENS if model.backbone.packs and probe.hidden.is_cpu else 0, math.inf


@torch.inference_mode()
def _time_step(model: Any, rows: int, length: int) -> float:
    """Seconds of layer 1 with its exit and the policy's question."""
    tokens = torch.full((rows, length), model.config.pad_token_id or 0, device=model.device)
    state = model.backbone.begin(tokens)
    started = time.perf_counter()
    state = model.backbone.step(1, state)
    view = model.view(1, state)
    view.exit_logit({}).cpu()
    view.logits.cpu()
    return time.perf_counter() - started


def _dropped(row: Row[_Waiting]) -> bool:
    return row.payload.request.answer.done()  # cancelled, or failed in another of its texts


def _work(job: _Job[Any]) -> None:
    if not job.answer.set_running_or_notify_cancel():
        return
    try:
        job.answer.set_result(job.work())
    except Exception as error:  # noqa: BLE001 - whoever waits is told
        job.answer.set_exception(error)


def _settle(request: _Request, error: Exception | None = None) -> None:
    """Answer, unless nobody waits any more or an error has been told already."""
    if request.answer.done() or not request.answer.set_running_or_notify_cancel():
        return
    if error is not None:
        request.answer.set_exception(error)
    else:
        request.answer.set_result([request.found[place] for place in range(request.texts)])
