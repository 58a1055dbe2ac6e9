"""What goes over a line between the front and a model's process: MessagePack, so that reading it runs no code.

A line begins with random bytes from the front; the model's process answers with their HMAC under the secret that Ray
has brought to both, with its name and with random bytes of its own, of which the front sends the HMAC. Then come
questions one way, answers the other, in any order.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from rl_exit import errors
from rl_exit.data.instances import Instances
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left

NONCE = 32  # bytes
MOST = 1 << 30  # bytes of a message
FIRST_MOST = 1024  # bytes of what is read from one who is not known yet

RUN, CANCEL, PING, PONG, ENDING = "run", "cancel", "ping", "pong", "ending"
MODEL, FRONT = b"model", b"front"  # who shows that it knows the secret
GONE = "gone"  # the kind of error with which a model's process that ends refuses what it has not begun
TOLD: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
}


def reader(most: int = MOST) -> msgpack.Unpacker:
    """Bytes in by ``feed``, messages out by iteration.

    Args:
        most: Bytes that a message may have; ``feed`` raises ``msgpack.BufferFull`` beyond.
    """
    return msgpack.Unpacker(max_buffer_size=most, use_list=False)


def written(message: Any) -> bytes:
    """A message as bytes."""
    packed: bytes = msgpack.packb(message)
    return packed


def proof(secret: bytes, nonce: bytes, who: bytes) -> bytes:
    """What shows that one knows the secret."""
    return hmac.digest(secret, who + nonce, hashlib.sha256)


def question(number: int, instances: Instances, wish: Wish) -> bytes:
    """N tokenised texts that are to be run; see :func:`asked`."""
    types = None if instances.token_types is None else instances.token_types.tobytes()
    words = (wish.operating_point, wish.threshold, wish.speed)
    sizes = instances.lengths.astype(np.int32).tobytes()
    return written((number, RUN, instances.tokens.tobytes(), sizes, types, instances.pad_token_id, words))


def asked(tokens: bytes, sizes: bytes, types: bytes | None, pad: int, words: Sequence[Any]) -> tuple[Instances, Wish]:
    """The other end of :func:`question`.

    Raises:
        ValueError: The parts do not fit each other.
    """
    lengths = np.frombuffer(sizes, np.int32).astype(np.int64)
    count = len(lengths)
    instances = Instances(
        ids=np.arange(count),
        labels=np.zeros(count, np.int64),
        tokens=np.frombuffer(tokens, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None if types is None else np.frombuffer(types, np.int8),
        pad_token_id=pad,
    )
    return instances, Wish(*words)


def answer(number: int, left: Sequence[Left], state: dict[str, Any]) -> bytes:
    """How N texts left; see :func:`answered`."""
    logits = np.stack([one.logits for one in left]) if left else np.zeros((0, 0), np.float32)
    layers = np.array([one.exit_layer for one in left], np.int32).tobytes()
    seconds = np.array([one.seconds for one in left]).tobytes()
    return written((number, logits.astype(np.float32).tobytes(), layers, seconds, state))


def answered(logits: bytes, layers: bytes, seconds: bytes) -> list[Left]:
    """The other end of :func:`answer`.

    Raises:
        ValueError: The parts do not fit each other.
    """
    depth = np.frombuffer(layers, np.int32).tolist()
    took = np.frombuffer(seconds, np.float64).tolist()
    if not depth:
        return []
    rows = np.frombuffer(logits, np.float32).reshape(len(depth), -1)
    return [Left(row, layer, time) for row, layer, time in zip(rows, depth, took, strict=True)]


def refusal(number: int, error: BaseException, gone: bool = False) -> bytes:
    """Why there is no answer; see :func:`refused`."""
    kind = GONE if gone else type(error).__name__
    told = str(error) if gone or kind in TOLD else f"{kind}: {error}"
    return written((number, kind, told))


def refused(kind: str, told: str) -> Exception:
    """The other end of :func:`refusal`, of one who is not gone."""
    return TOLD.get(kind, RuntimeError)(told)


def tune(connection: socket.socket) -> None:
    """Send at once, and find out within some seconds that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux has all of these; elsewhere the machine's own patience counts.
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
