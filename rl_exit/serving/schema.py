"""Requests and answers of the HTTP API, and the limits on what comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from rl_exit.errors import ConfigError, nearest

FULL_DEPTH = "full-depth"
"""The operating point that every model has: nothing leaves before the last layer."""


@dataclass(frozen=True)
class Wish:
    """When the texts of a request leave; everything None: as the model says.

    Attributes:
        operating_point: By name.
        threshold: Of the policy, 0 to 1.
        speed: Place on the dial, 0 (full depth) to 1, where the model has one.
    """

    operating_point: str | None = None
    threshold: float | None = None
    speed: float | None = None


@dataclass(frozen=True)
class WriteRequest:
    """Texts to be written; made of plain values, so that it can go to another process.

    Attributes:
        prompts: One or more texts.
        options: Settings by the names of :class:`rl_exit.generation.sampling.Settings`.
        seed: Of the draws; prompt i is drawn with ``seed + i``.
        wish: When tokens leave.
        given: For each prompt the tokens that the client has already; none at all: nothing yet.
    """

    prompts: Sequence[str]
    options: Mapping[str, Any]
    seed: int
    wish: Wish = field(default_factory=Wish)
    given: Sequence[Sequence[int]] = ()


def unknown_point(name: str, known: Sequence[str]) -> str:
    """What to say of an operating point that is not there."""
    return f"operating_point {name!r:.60} is unknown; accepted: {', '.join(known)}.{nearest(name[:60], known)}"


@dataclass(frozen=True)
class Limits:
    """What is accepted.

    Attributes:
        max_chars: Characters of a text.
        max_texts: Texts of a request.
        max_body: Bytes of a request's body.
        max_waiting: Texts inside the server at once; more are refused with status 503.
        timeout: Seconds until a request is given up with status 504.
    """

    max_chars: int = 20_000
    max_texts: int = 256
    max_body: int = 1_000_000
    max_waiting: int = 4096
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_chars", "max_texts", "max_body", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; accepted: a whole number from 1")


@dataclass(frozen=True)
class ModelInfo:
    """What clients are told of the model.

    Attributes:
        name: As it was given to the command.
        labels: [C].
        num_layers: L.
        max_tokens: Tokens per text; longer texts are cut.
        operating_points: Names that a request may use.
        threshold: At which texts leave where a request names nothing.
        has_dial: Whether a request may name a speed.
    """

    name: str
    labels: list[str]
    num_layers: int
    max_tokens: int
    operating_points: list[str]
    threshold: float
    has_dial: bool = False


Text = Annotated[str, Strict(), Field(min_length=1, description="Not blank.")]
Point = Annotated[str, Strict(), Field(description="An operating point of the model; see GET /v1/model.")]
Threshold = Annotated[
    float,
    Strict(),
    Field(ge=0, le=1, allow_inf_nan=False, description="Leave where the policy's probability of exit is above it."),
]


Speed = Annotated[
    float,
    Strict(),
    Field(ge=0, le=1, allow_inf_nan=False, description="0 (full depth) to 1; only where the model has a dial."),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    operating_point: Point | None = None
    threshold: Threshold | None = None
    speed: Speed | None = None

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if sum(wish is not None for wish in (self.operating_point, self.threshold, self.speed)) > 1:
            raise ValueError("give one of operating_point, threshold and speed")
        return self


class OneText(_Body):
    """A text, or a pair of texts."""

    text: Text
    text_pair: Text | None = None


class ManyTexts(_Body):
    """Several texts, or pairs of texts."""

    texts: Annotated[list[Text], Field(min_length=1)]
    text_pairs: Annotated[list[Text] | None, Field(description="A second text for each.")] = None

    @model_validator(mode="after")
    def _as_many_pairs(self) -> Self:
        if self.text_pairs is not None and len(self.text_pairs) != len(self.texts):
            raise ValueError(f"{len(self.texts)} texts and {len(self.text_pairs)} text_pairs; one for each is needed")
        return self


class Answer(BaseModel):
    """The answer for a text; ``milliseconds`` is its time in the model, waiting included."""

    label: str
    label_id: int
    probabilities: list[float]
    exit_layer: int
    milliseconds: float


class Answers(BaseModel):
    """Answers in the order of the texts."""

    predictions: list[Answer]


class Layer(BaseModel):
    """What one layer says.

    ``exit_probability`` is the policy's, given that the text is still inside; ``leaves_here`` that of leaving at just
    this layer, if exits were drawn from the policy.
    """

    layer: int
    label: str
    probability: float
    exit_probability: float
    leaves_here: float


class Explanation(BaseModel):
    """One text, layer by layer; times are those of the text alone, without waiting."""

    label: str
    probability: float
    exit_layer: int
    num_layers: int
    tokens: int
    layers: list[Layer]
    milliseconds: float
    full_depth_milliseconds: float


class ModelAnswer(BaseModel):
    """What the server serves, and its limits."""

    name: str
    labels: list[str]
    num_layers: int
    max_tokens: int
    operating_points: list[str]
    threshold: float
    has_dial: bool
    max_chars: int
    max_texts: int
    max_body: int


class Problem(BaseModel):
    """Why a request was refused: a word for programs, a sentence for people, and where in the request."""

    error: str
    message: str
    where: str | None = None


class Health(BaseModel):
    """``ok``, or ``draining`` while the server ends."""

    status: str
