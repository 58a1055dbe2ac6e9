"""Requests and answers of the HTTP API of decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from rl_exit.generation import LEAST_TEMPERATURE
from rl_exit.serving.schema import Point, Text, Threshold, Wish

DRAWING = ("temperature", "top_k", "top_p", "seed")
MOST_STOPS = 16
LONGEST_STOP = 200


@dataclass(frozen=True)
class WriterInfo:
    """What clients are told of a decoder.

    Attributes:
        name: As it was given to the command.
        num_layers: L.
        exit_layers: Layers with an exit.
        max_context: Tokens of a prompt and of what follows it, together.
        operating_points: Names that a request may use.
        threshold: At which tokens leave where a request names nothing.
    """

    name: str
    num_layers: int
    exit_layers: list[int]
    max_context: int
    operating_points: list[str]
    threshold: float


Stop = Annotated[str, Strict(), Field(min_length=1, max_length=LONGEST_STOP)]
Tokens = Annotated[int, Strict(), Field(ge=1, description="Tokens to write at most.")]
Temperature = Annotated[
    float, Strict(), Field(ge=LEAST_TEMPERATURE, le=100, allow_inf_nan=False, description="Below 1 sharpens.")
]
TopK = Annotated[int, Strict(), Field(ge=0, le=10**9, description="Draw from the k likeliest; 0: from all.")]
TopP = Annotated[
    float, Strict(), Field(gt=0, le=1, allow_inf_nan=False, description="Draw from the fewest of this probability.")
]
Seed = Annotated[
    int, Strict(), Field(ge=0, lt=2**62, description="Prompt i is drawn with seed + i; left out: one is chosen.")
]


class Prompts(BaseModel):
    """Prompts and how to go on from them. ``do_sample`` is implied by temperature, top_k, top_p and seed."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    max_new_tokens: Tokens = 64
    do_sample: Annotated[bool | None, Strict(), Field(description="Draw tokens; false: take the likeliest.")] = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop_strings: Annotated[
        list[Stop], Field(max_length=MOST_STOPS, description="A text ends before the first of these.")
    ] = []
    stream: Annotated[bool, Strict(), Field(description="Send each token when it is there (server-sent events).")] = (
        False
    )
    operating_point: Point | None = None
    threshold: Threshold | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.operating_point is not None and self.threshold is not None:
            raise ValueError("give one of operating_point and threshold")
        idle = [name for name in DRAWING if getattr(self, name) is not None]
        if self.do_sample is False and idle:
            raise ValueError(f"{', '.join(idle)}: for tokens that are drawn, and do_sample is false")
        return self

    @property
    def prompts(self) -> list[str]:
        """One or more."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def options(self) -> dict[str, object]:
        """Settings by the names of :class:`rl_exit.generation.sampling.Settings`; what is left out is the model's."""
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        drawn = self.do_sample
        if drawn is None and any(getattr(self, name) is not None for name in DRAWING):
            drawn = True
        return {
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": tuple(self.stop_strings),
            **{name: value for name, value in {**given, "do_sample": drawn}.items() if value is not None},
        }

    def wish(self) -> Wish:
        """When tokens leave."""
        return Wish(self.operating_point, self.threshold)


class WrittenToken(BaseModel):
    """One token, as the stream tells it; ``text`` is what can be shown now, and ``finish`` comes with the last one."""

    index: int
    token: int
    text: str
    exit_layer: int
    finish: Literal["eos", "stop", "length"] | None


class Written(BaseModel):
    """What follows a prompt; the first token comes from the prompt's pass, which is at full depth.

    ``seed`` is that of the draws; with it the same request gives the same text. Times are from the request's arrival.
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    mean_exit_layer: float
    finish: Literal["eos", "stop", "length"]
    seed: int
    first_token_milliseconds: float
    milliseconds: float


class ManyWritten(BaseModel):
    """For several prompts, in their order."""

    generations: list[Written]


class WriterAnswer(BaseModel):
    """What the server serves, and its limits."""

    name: str
    kind: Literal["decoder"] = "decoder"
    num_layers: int
    exit_layers: list[int]
    max_context: int
    operating_points: list[str]
    threshold: float
    max_chars: int
    max_texts: int
    max_body: int
