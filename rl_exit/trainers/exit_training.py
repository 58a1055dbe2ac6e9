"""Initialisation and task step as a Ray Train job (in this process with 0 workers, data-parallel otherwise)."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_exit.config import OptimConfig
from rl_exit.criteria.heads import learned_head
from rl_exit.criteria.learned import write_learned
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError, UserError
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.lora import add_lora, merge_lora
from rl_exit.objectives import DRAWS, Objective, ObjectiveOptions, Shape, objective, task_step
from rl_exit.seeding import derive_seed
from rl_exit.trainers.staging import at_hand, collect
from rl_exit.trainers.supervised import OnUpdate, OptimSettings, Rank, fit
from rl_exit.trainers.train_crew import TrainCrew


@dataclass(frozen=True)
class LoraSettings:
    """Plain values of :class:`rl_exit.config.LoraConfig`; rank 0 trains the whole backbone."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ExitTraining:
    """One training of backbone and exits, self-contained, so that it can be sent to workers.

    Attributes:
        model: Folder of the model to start from.
        instances: File of the tokenised training set.
        output: Folder for the trained model; heads that are trained along go into ``criteria`` below it.
        checkpoint: Folder for the state of an interrupted training.
        weights: What is learnt: a word of ``rl_exit.objectives.OBJECTIVES`` (initialisation), or how the task step
            draws exits (``"sample"`` or ``"expected"``).
        settings: Optimiser settings.
        lora: Adapters in place of a full update of the backbone.
        seed: Seed of this training.
        options: Settings of the objective.
        visits: File for the answers of the last exit during training, from which forgetting events are counted; None:
            not kept.
        exchange: Fields of :class:`~rl_exit.trainers.staging.Exchange`, for workers that do not see these paths; None:
            all must see them.
    """

    model: str
    instances: str
    output: str
    checkpoint: str
    weights: str
    settings: OptimSettings
    lora: LoraSettings
    seed: int
    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    visits: str | None = None
    exchange: Mapping[str, str] | None = None


def objective_options(section: OptimConfig) -> ObjectiveOptions:
    """The objective's settings out of a configuration section, which need not have all of them."""
    names = (name for name in ObjectiveOptions.__dataclass_fields__ if name in type(section).model_fields)
    return ObjectiveOptions(**{name: getattr(section, name) for name in names})


def train_exits(
    job: ExitTraining, on_update: OnUpdate, num_workers: int = 0, use_gpu: bool = False, crew: TrainCrew | None = None
) -> None:
    """Run a training to its end; the result is in ``job.output``.

    Args:
        job: What to train.
        on_update: Called as the training goes on, from this process.
        num_workers: Ray Train workers; 0 trains here, without a cluster.
        use_gpu: One GPU per worker.
        crew: Workers that are kept for further trainings; None: they are started for this one.

    Raises:
        UserError: What the training itself raised for the user, or workers lost again and again.
    """
    if crew is None and num_workers == 0:
        _train_here(job, on_update, use_gpu)
        return
    workers = crew or train_crew(num_workers, use_gpu, Path(job.checkpoint).parent / "train")
    try:
        workers.do(asdict(job) | absolute_paths(job), on_update)
        paths: dict[str, Any] = dict(absolute_paths(job))
        collect(replace(job, **paths))
    finally:
        if crew is None:
            workers.stop()


def train_crew(num_workers: int, use_gpu: bool, storage: Path, timeout: float = 120.0) -> TrainCrew:
    """Ray Train workers for any number of trainings, not yet started; the caller stops them."""
    return TrainCrew(num_workers, use_gpu, storage, _train_as_rank, timeout)


def _train_here(job: ExitTraining, on_update: OnUpdate, use_gpu: bool) -> None:
    """The same through Ray Train in this process, which needs no cluster."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)

    def loop(config: dict[str, Any]) -> None:
        _train(_from_payload(config), on_update, Rank(), wrap=lambda module: module, device=_device(use_gpu))

    trainer = TorchTrainer(
        loop,
        train_loop_config=asdict(job) | absolute_paths(job),
        scaling_config=ScalingConfig(num_workers=0, use_gpu=use_gpu),
        # The same name resumes silently, so every fit has its own.
        run_config=RunConfig(
            name=f"fit-{uuid.uuid4().hex[:8]}", storage_path=str(Path(job.checkpoint).parent.absolute() / "train")
        ),
    )
    try:
        trainer.fit()
    except UserError:
        raise
    except Exception as error:
        told = _user_error_in(error)
        if told is None:
            raise
        raise told from error


def absolute_paths(job: ExitTraining) -> dict[str, str]:
    """The paths of a training from the root: workers of Ray Train have a working directory of their own."""
    names = ("model", "instances", "output", "checkpoint", "visits")
    return {name: str(Path(getattr(job, name)).absolute()) for name in names if getattr(job, name) is not None}


def _train_as_rank(payload: dict[str, Any], report: OnUpdate, index: int, world: int) -> None:
    """A training as one of several Ray Train workers."""
    import ray.train.torch

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))

    def wrap(module: nn.Module) -> nn.Module:
        return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"find_unused_parameters": True})

    with at_hand(_from_payload(payload), report, is_first=index == 0) as (job, tell):
        _train(job, tell, Rank(index, world), wrap, ray.train.torch.get_device())


def _train(
    job: ExitTraining,
    on_update: OnUpdate,
    rank: Rank,
    wrap: Callable[[nn.Module], nn.Module],
    device: torch.device | None,
) -> None:
    model: Any = EarlyExitModel.from_pretrained(job.model)
    instances = Instances.open(Path(job.instances))
    model.requires_grad_(True)
    model.policy.requires_grad_(False)
    if job.lora.rank:
        torch.manual_seed(job.seed)
        add_lora(model, job.lora.rank, job.lora.alpha, job.lora.dropout, job.lora.targets)
    if device is not None:
        model.to(device)
    chosen = _objective(job, model)
    visits = fit(model, chosen, instances, job.settings, job.seed, Path(job.checkpoint), on_update, rank, wrap, device)
    if rank.index == 0:
        if job.lora.rank:
            merge_lora(model)
        model.to("cpu").save_pretrained(job.output)
        if job.visits is not None:
            visits.save(Path(job.visits), instances.ids)
        _save_heads(job, model, chosen)


def _objective(job: ExitTraining, model: Any) -> Objective:
    """The job's objective for this model; its heads derive from the job's seed."""
    decoder = isinstance(model, EarlyExitCausalModel)
    if job.weights in DRAWS:
        if decoder:
            return task_step(lambda states, _: model.exit_logits(states), job.weights, job.settings.epochs, job.options)

        def policy(states: Tensor, logits: Tensor) -> Tensor:
            # In training the exits' answers come with dropout; the policy reads them as it will when the model is used.
            # Eq. 6 draws exits by the learned pi: confidence orders them, but is no distribution over layers.
            training = model.exits.dropout.training
            model.exits.dropout.eval()
            try:
                return model.policy_logits(states, model.exits(states))
            finally:
                model.exits.dropout.train(training)

        return task_step(policy, job.weights, job.settings.epochs, job.options)
    if decoder:
        shape = Shape(model.num_exits, model.backbone.hidden_size, model.head_weight.shape[0])
    else:
        shape = Shape(model.num_layers, model.exits.hidden_size, model.exits.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(job.seed, "heads"))
        chosen = objective(job.weights, shape, job.settings.epochs, job.options)
    if decoder and (chosen.heads or any(phase.exits != "all" for phase in chosen.phases)):
        raise ConfigError(
            f"init.objective = '{job.weights}' trains exits in turn, and those of a decoder share one head; "
            "accepted: weighted, uniform, distilled"
        )
    return chosen


def _save_heads(job: ExitTraining, model: Any, chosen: Objective) -> None:
    """Write the heads that were trained along as criteria beside the model."""
    notes: dict[str, object] = {"objective": job.weights, "epochs": chosen.epochs, "seed": job.seed}
    for word, head in chosen.heads.items():
        sizes = (model.num_layers, model.exits.hidden_size, model.exits.num_classes)
        write_learned(Path(job.output) / "criteria", learned_head(word, head, *sizes, notes=notes))


def _from_payload(payload: Mapping[str, Any]) -> ExitTraining:
    values = dict(payload)
    values["settings"] = OptimSettings(**values["settings"])
    values["lora"] = LoraSettings(**values["lora"])
    values["options"] = ObjectiveOptions(**values["options"])
    return ExitTraining(**values)


def _device(use_gpu: bool) -> torch.device | None:
    if not use_gpu:
        return None
    if not torch.cuda.is_available():
        raise UserError("task_step.use_gpu=true, but torch finds no GPU here; set it to false")
    return torch.device("cuda")


def _user_error_in(error: BaseException) -> UserError | None:
    """The user's error inside whatever Ray Train wrapped around it."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (
            seen,
            *getattr(seen, "worker_failures", {}).values(),
            getattr(seen, "training_failed_error", None),
        ):
            if isinstance(inner, UserError):
                return inner
        seen = seen.__cause__ or seen.__context__
    return None
