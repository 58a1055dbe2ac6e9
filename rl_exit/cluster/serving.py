"""A model as a Ray Serve application: one front that speaks HTTP, and replicas of the model behind it.

The front (:mod:`rl_exit.serving.http`) checks what comes in and hands it to the model's process of a replica, on a line
of its own (:mod:`rl_exit.serving.lines`), or to the replica by a call of Ray's; if that replica dies before it has
answered, the request goes to another one, so that none is lost. Answers are the same whoever gives them and nothing is
changed by asking twice, so that is safe. Several requests wait in a replica at once; its pool runs their texts together
(:mod:`rl_exit.serving.engine`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
import uvicorn
from ray import serve

from rl_exit.cluster.replicas import Asking, Replicas, Writers
from rl_exit.errors import ConfigError, UserError
from rl_exit.serving.http import Front, build_app
from rl_exit.serving.lines import Lines, Meeting
from rl_exit.serving.model_process import ModelGone, ModelProcess, ModelSettings
from rl_exit.serving.schema import FULL_DEPTH, Limits, ModelInfo, Wish, WriteRequest
from rl_exit.serving.texts import TextSide
from rl_exit.serving.writing_http import WritingFront, build_writing_app
from rl_exit.serving.writing_schema import WriterInfo
from rl_exit.trainers.local_ray import start_local

NAME = "rl-exit"
FRONT = "front"  # the deployment
DRAIN = 30.0  # seconds that open requests are waited for at the end
KEPT_OPEN = 90  # seconds that a client's idle connection is kept
FRONT_ENDS = 2.0  # seconds more for the HTTP side, which has waited for its requests before it is ended

LINES_WAIT = 10.0  # seconds that replicas may take to call, before requests go through Ray until they do
CALLED_AGAIN = 0.5  # seconds before a model whose line has ended calls the front again
PLAIN_WAIT = 0.025  # seconds that plain batching waits for a batch: short of it batches stand in line, beyond it texts

QUIET = {"log_level": "ERROR", "enable_access_log": False}

# What makes Serve cheaper for replicas whose code never blocks its event loop, as ours: one loop in place of three.
# A request has few texts: threads of the tokenizer cost more than they save, and the model wants the other cores.
SETTINGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

LOG = logging.getLogger("ray.serve")

Batching = Literal["pooled", "plain"]


@dataclass(frozen=True)
class ServeOptions:
    """What ``rl-exit serve`` is given.

    Attributes:
        model: A model folder, a run directory or a hub id.
        host: Address to listen at.
        port: Port to listen at.
        replicas: Processes with a copy of the model.
        threads: Torch threads of each.
        batching: ``pooled``, or ``plain``: ``serve.batch``, each batch to its end; for comparison.
        batch_size: Most texts in a step (plain: requests in a batch; decoder: texts that are written at a time).
        deadline: Seconds that texts wait for others; None: pooled 0, plain 0.025. A decoder's do not wait.
        goal: Seconds within which as many requests as possible are answered, others later; None: as they came.
        lines: Whether a classifier's requests go straight to the model's process, or through Ray.
        max_context: Decoder: most tokens of a prompt and of what follows it; memory is set aside for all rows.
        limits: On what comes in.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    threads: int = 1
    batching: Batching = "pooled"
    batch_size: int = 32
    deadline: float | None = None
    goal: float | None = None
    lines: bool = True
    max_context: int = 2048
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("replicas", "threads", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; accepted: a whole number from 1")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port = {self.port}; accepted: 1 to 65535")
        if self.deadline is not None and not self.deadline >= 0:
            raise ConfigError(f"deadline = {self.deadline} seconds; accepted: 0 or more")
        if self.batching not in ("pooled", "plain"):
            raise ConfigError(f"batching = {self.batching!r}; accepted: pooled, plain")
        if self.goal is not None and not self.goal > 0:
            raise ConfigError(f"goal = {self.goal} seconds; accepted: more than 0")
        if self.goal is not None and (self.deadline or self.batching == "plain"):
            raise ConfigError(
                f"goal = {self.goal} seconds, deadline = {self.deadline}, batching = {self.batching!r}; accepted: a "
                "goal with 'pooled' and without a deadline (plain batches are answered as they came)"
            )


def uses_lines(options: ServeOptions) -> bool:
    """Whether requests of a classifier go straight to its processes; plain batching is a matter of Serve's replicas."""
    return options.lines and options.batching == "pooled"


@dataclass(frozen=True)
class Known:
    """What is known of a model without its weights.

    Attributes:
        info: What clients are told.
        texts: A classifier's tokenizer and labels.
    """

    info: ModelInfo | WriterInfo
    texts: TextSide | None = None


class ModelReplica:
    """One copy of a classifier, in a process beside this one; a Serve deployment.

    Args:
        options: What the command was given; ``options.model`` is a folder that this node can read, or a hub id.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._pooled = options.batching == "pooled"
        self._calls = uses_lines(options)
        pooled_wait, plain_wait = (0.0, PLAIN_WAIT) if options.deadline is None else (options.deadline,) * 2
        goal = math.inf if options.goal is None else options.goal
        settings = ModelSettings(options.model, options.threads, options.batch_size, pooled_wait, goal)
        # Without its model a replica is dead: then whoever waits for it asks another, and Serve makes a new one.
        self._model = ModelProcess(settings, gone=lambda: os._exit(1))
        self._together.set_max_batch_size(options.batch_size)
        self._together.set_batch_wait_timeout_s(plain_wait)
        self._line: asyncio.Task[None] | None = None

    async def answer(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.service.ModelService.answer`; who answered and how it stands comes along."""
        sides = self._model.texts
        instances = sides.tokenised(texts, pairs)
        if self._pooled:
            left, state = await self._model.run(instances, wish)
        else:
            started = time.monotonic()
            left, state = await self._together((instances, wish))
            left = [replace(one, seconds=time.monotonic() - started) for one in left]
        return {"answers": sides.told(left), **self._told(state)}

    async def explain(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.service.ModelService.explain`."""
        return await self._model.explain(self._model.texts.tokenised([text], None if pair is None else [pair]), wish)

    async def state(self) -> dict[str, Any]:
        """Who this is, and what its model says of itself."""
        return self._told(await self._model.state())

    async def check_health(self) -> None:
        """Asked by Serve; a replica whose model does not answer is replaced. The first time, it is put on a line.

        Raises:
            ModelGone: Its thread has ended.
        """
        await self._model.state()
        if self._calls and (self._line is None or self._line.done()):
            self._line = asyncio.get_running_loop().create_task(self._stay_on_line())

    def __del__(self) -> None:
        """Called by Serve when all requests are answered."""
        if hasattr(self, "_model"):
            self._model.close(DRAIN - 5.0)  # of requests on lines Serve knows nothing, so they are waited for here

    def _told(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"replica": self._name, "state": state}

    async def _stay_on_line(self) -> None:
        """Have the model call the front, and again when that line has ended, as by another front."""
        told = ""
        while True:
            try:
                front = serve.get_deployment_handle(FRONT, NAME).options(_by_reference=False)
                await self._model.on_line(await front.meeting.remote(), self._name)
                told = ""
            except ModelGone:
                return
            except Exception as error:  # noqa: BLE001 - until then it is asked through Ray, or others are
                if str(error) != told:
                    told = str(error)
                    LOG.error("replica %s is on no line to the front, and tries again: %s", self._name, told)
            await asyncio.sleep(CALLED_AGAIN)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=PLAIN_WAIT)
    async def _together(self, requests: list[Any]) -> list[Any]:
        """Plain batching."""
        found, state = await self._model.together(requests)
        return [(left, state) for left in found]


class WriterReplica:
    """One copy of a decoder; a Serve deployment.

    Args:
        options: What the command was given; ``options.model`` is a folder that this node can read, or a hub id.
    """

    def __init__(self, options: ServeOptions) -> None:
        import torch

        from rl_exit.models.early_exit import EarlyExitModel
        from rl_exit.serving.writer import WritingService

        torch.set_num_threads(options.threads)
        sys.setswitchinterval(0.0005)  # the model's thread and the event loop take turns more often than every 5 ms
        self._name = serve.get_replica_context().replica_id.unique_id
        model = EarlyExitModel.from_pretrained(options.model)
        self._service = WritingService(model, options.batch_size, options.max_context)

    async def stream(self, request: WriteRequest) -> AsyncGenerator[list[dict[str, Any]], None]:
        """See :meth:`rl_exit.serving.writer.WritingService.stream`."""
        async with aclosing(self._service.stream(request)) as parts:
            async for part in parts:
                yield part

    async def whole(self, request: WriteRequest) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.writer.WritingService.whole`; who wrote and how it stands comes along."""
        return {"tokens": await self._service.whole(request), **self.state()}

    def state(self) -> dict[str, Any]:
        """Who this is, and what its service says of itself."""
        return {"replica": self._name, "state": self._service.state()}

    def check_health(self) -> None:
        """Asked by Serve; a replica whose model thread is gone is replaced.

        Raises:
            RuntimeError: It is gone.
        """
        if not self._service.engine.alive:
            raise RuntimeError("the thread of the model has ended")

    def __del__(self) -> None:
        """Called by Serve when all requests are answered."""
        if hasattr(self, "_service"):
            self._service.close()


class HttpFront:
    """The HTTP side; a Serve deployment with one replica, which listens itself.

    Serve's own way to a deployment, its proxy, takes as much processor time a request as the layers of a short text;
    uvicorn in this process a tenth of that.

    Args:
        handle: Of :class:`ModelReplica` or :class:`WriterReplica`.
        known: What is known of the model.
        options: Where to listen, and limits.
        here: Where the models' processes call; 127.0.0.1 where all are on this machine.
    """

    def __init__(self, handle: Any, known: Known, options: ServeOptions, here: str) -> None:
        info = known.info
        # By gRPC a short call takes half the processor time of Ray's own, which carry objects by reference. Of one that
        # was cancelled Serve's router then knows no better for ten seconds, so a decoder's long ones go Ray's way.
        asking = Asking(handle if isinstance(info, WriterInfo) else handle.options(_by_reference=False))
        self._lines, self._here = Lines(self._count_lines), here
        if isinstance(info, WriterInfo):
            writing = WritingFront(Writers(asking), info, options.limits)
            self._door, self._application = writing.door, build_writing_app(writing)
        else:
            assert known.texts is not None
            front = Front(Replicas(asking, known.texts, self._lines), info, options.limits)
            self._metrics = front.metrics
            self._door, self._application = front.door, build_app(front)
        asking.retried = self._door.metrics.retries.inc
        self._address = (options.host, options.port)
        self._listening: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Asked by Serve before the front counts as there, and every second from then on; the first time, it listens.

        Raises:
            RuntimeError: It listens no more.
            OSError: Another process has taken the address.
        """
        if self._listening is None:
            settings: dict[str, Any] = {"lifespan": "off", "access_log": False, "log_config": None}
            config = uvicorn.Config(self._application, timeout_keep_alive=KEPT_OPEN, **settings)
            address = bound(*self._address)
            address.listen()  # here, so that an address which another process has taken is told
            listening = uvicorn.Server(config).serve([address])
            self._listening = asyncio.get_running_loop().create_task(listening)
        if self._listening.done():
            raise RuntimeError("the HTTP side has ended")

    async def meeting(self) -> Meeting:
        """Where the models' processes call."""
        return await self._lines.listen(self._here)

    async def on_line(self) -> int:
        """Models that have called."""
        return len(self._lines.names())

    def _count_lines(self, count: int) -> None:
        self._metrics.lines.set(count)

    async def drain(self, timeout: float) -> int:
        """See :meth:`rl_exit.serving.web.Door.drain`."""
        return await self._door.drain(timeout)


def application(options: ServeOptions, known: Known, alone: bool) -> Any:
    """The Serve application.

    Args:
        options: What is served, where and how.
        known: What is known of the model.
        alone: Whether all of it runs on this machine, so that nothing need be reached from another.
    """
    most = options.limits.max_waiting + 64
    model = serve.deployment(
        WriterReplica if isinstance(known.info, WriterInfo) else ModelReplica,
        name="model",
        num_replicas=options.replicas,
        max_ongoing_requests=most,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=DRAIN,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": SETTINGS}},
        logging_config=QUIET,
    ).bind(options)
    here = ray.util.get_node_ip_address()  # where the command runs, and people expect the port
    front = serve.deployment(
        HttpFront,
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=most,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=FRONT_ENDS,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {f"node:{here}": 0.001},
            "runtime_env": {"env_vars": SETTINGS},
        },
        logging_config=QUIET,
    )
    return front.bind(model, known, options, "127.0.0.1" if alone else here)


def serve_model(options: ServeOptions, ready: Callable[[str], None], stop: threading.Event | None = None) -> int:
    """Serve until told to stop; open requests are answered first.

    Args:
        options: What is served, where and how.
        ready: Told the address when requests are taken.
        stop: Ends it when set; SIGTERM and SIGINT set it where this is the main thread.

    Returns:
        Requests that were still open after ``DRAIN`` seconds, normally 0.

    Raises:
        UserError: The model cannot be loaded, or the address cannot be used.
    """
    check_address(options.host, options.port)
    known, options = describe(options)
    stop = stop or threading.Event()
    # Ray sets handlers of its own when it starts, so ours come after it. While Serve starts they wait.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with _session(options) as alone, _signals(stop):
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # the front listens itself
        try:
            handle = serve.run(application(options, known, alone), name=NAME, route_prefix=None)
            _wait_for_lines(handle, options, known, stop)
            if not stop.is_set():
                ready(f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}")
            while not stop.wait(1.0):
                pass
            left: int = handle.drain.remote(DRAIN).result()
            return left
        finally:
            serve.shutdown()


def _wait_for_lines(handle: Any, options: ServeOptions, known: Known, stop: threading.Event) -> None:
    """Until all replicas are on a line, so that the first requests need not go through Ray; within limits."""
    if known.texts is None or not uses_lines(options):
        return
    until = time.monotonic() + LINES_WAIT
    found = 0
    while found < options.replicas and time.monotonic() < until and not stop.wait(0.1):
        with suppress(Exception):  # the front may be slow, or be replaced
            found = handle.on_line.remote().result(timeout_s=1.0)


def describe(options: ServeOptions) -> tuple[Known, ServeOptions]:
    """Load the model once, so that what is wrong with it is said at once and in words.

    Returns:
        What is known of it, and the options with the model's absolute folder.

    Raises:
        UserError: The model cannot be loaded.
    """
    from rl_exit.models.causal import EarlyExitCausalModel
    from rl_exit.models.early_exit import EarlyExitModel
    from rl_exit.serving.service import has_dial, operating_points

    name = options.model
    inside = Path(options.model) / "model"
    is_run = (inside / "config.json").is_file() and not (Path(options.model) / "config.json").exists()
    folder = str(inside) if is_run else options.model
    model = EarlyExitModel.from_pretrained(folder)
    options = replace(options, model=str(Path(folder).resolve()) if Path(folder).is_dir() else folder)
    if isinstance(model, EarlyExitCausalModel):
        return Known(_writer_info(model, name, options)), options
    config = model.config
    info = ModelInfo(
        name=name,
        labels=[config.id2label[number] for number in range(config.num_labels)],
        num_layers=model.num_layers,
        max_tokens=model.max_length,
        operating_points=operating_points(model),
        threshold=float(config.threshold),
        has_dial=has_dial(model),
    )
    return Known(info, TextSide.of(model)), options


def _writer_info(model: Any, name: str, options: ServeOptions) -> WriterInfo:
    from rl_exit.serving.writer import check_writer, context_of

    if options.batching == "plain":
        raise ConfigError("batching = 'plain' is for classifiers; a decoder is served with 'pooled'")
    if options.goal is not None:
        raise ConfigError(
            f"goal = {options.goal} seconds is for classifiers; a decoder's texts are written as they came"
        )
    check_writer(model, name)
    return WriterInfo(
        name=name,
        num_layers=model.num_layers,
        exit_layers=list(model.exit_layers),
        max_context=context_of(model, options.max_context),
        operating_points=[FULL_DEPTH],
        threshold=float(model.config.threshold),
    )


def check_address(host: str, port: int) -> None:
    """Refuse an address at which nobody can listen, before anything is started.

    Raises:
        UserError: The port is taken or not allowed, or the host is none of this machine.
    """
    try:
        bound(host, port).close()
    except (OSError, UnicodeError) as error:  # the latter of what cannot be the name of a host
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen at {host}:{port}: {reason}; choose another with --port or --host") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        OSError: It cannot be.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda *_: stop.set()) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _session(options: ServeOptions) -> Iterator[bool]:
    """A Ray of its own on this machine (True), or the one that this process has joined."""
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: people wait for a server
        start_local(max(options.replicas + 1, os.cpu_count() or 1), logging_level=logging.ERROR)
    try:
        yield started
    finally:
        if started:
            ray.shutdown()
