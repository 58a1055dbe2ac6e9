"""The supervised loop under initialisation (Eq. 1-2), the peers' objectives and the task step (Eq. 6).

One loop serves them all: an objective says in which phases the model is trained, with which loss, and which parts. It
runs in one process or as one of several ranks, and stops and goes on exactly: the order of the data and every random
draw derive from (seed, update, rank), so a checkpoint is weights, optimiser state and the number of updates.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from rl_exit.data.batching import count_batches, shuffled_batches
from rl_exit.data.instances import Instances
from rl_exit.errors import UserError
from rl_exit.objectives import Objective, Phase, exit_losses
from rl_exit.seeding import derive_seed
from rl_exit.trainers.fit_state import FitState
from rl_exit.trainers.forgetting import Visits
from rl_exit.trainers.frozen_states import frozen_states
from rl_exit.trainers.phase_module import PhaseModule, kept_exits

CHECKPOINT_SECONDS = 300.0
HEADS = "heads."
OnUpdate = Callable[[int, int, float, dict[str, float]], None]


@dataclass(frozen=True)
class OptimSettings:
    """Plain values of :class:`rl_exit.config.OptimConfig`."""

    epochs: int
    batch_size: int
    lr: float
    head_lr: float
    warmup: float
    weight_decay: float
    clip: float
    accumulate: int
    precision: str


@dataclass(frozen=True)
class Rank:
    """Place of this process among those that train together."""

    index: int = 0
    world: int = 1


def fit(
    model: nn.Module,
    objective: Objective,
    instances: Instances,
    settings: OptimSettings,
    seed: int,
    checkpoint: Path,
    on_update: OnUpdate,
    rank: Rank = Rank(),
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    device: torch.device | None = None,
) -> Visits:
    """Train until all phases are done; goes on from ``checkpoint`` if one is there.

    Args:
        model: With ``all_exits``, ``backbone`` and ``exits``; of the parameters with ``requires_grad`` each phase
            trains, in place, those that it names.
        objective: Phases, losses and heads; its epochs count, not those of ``settings``.
        instances: Training set.
        settings: Optimiser settings; a batch is ``batch_size`` per rank and ``accumulate`` of them make an update.
        seed: Decides the order of the data, dropout and the draws.
        checkpoint: Folder for the state of an interrupted training; rank 0 writes it every few minutes.
        on_update: Called with (updates done, of how many, epochs done, named values), counted over all phases.
        rank: This process.
        wrap: Puts a module into a data-parallel wrapper.
        device: Where the batches go; default: CPU.

    Returns:
        Whether the last exit was right at each visit, in the epochs that trained the backbone.

    Raises:
        UserError: The loss is no longer finite.
    """
    return _Fit(model, objective, instances, settings, seed, checkpoint, on_update, rank, wrap, device).go()


class _Fit:
    """One training; see :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        instances: Instances,
        settings: OptimSettings,
        seed: int,
        checkpoint: Path,
        on_update: OnUpdate,
        rank: Rank,
        wrap: Callable[[nn.Module], nn.Module],
        device: torch.device | None,
    ) -> None:
        self.model, self.objective, self.instances, self.settings = model, objective, instances, settings
        self.seed, self.on_update, self.rank, self.wrap, self.device = seed, on_update, rank, wrap, device
        self.per_epoch = _updates_per_epoch(len(instances), settings, rank.world)
        self.total = self.per_epoch * objective.epochs
        self.autocast = precision_context(settings.precision, device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.heads = nn.ModuleDict(objective.heads)
        if device is not None:
            self.heads.to(device)
        self.trained |= {f"{HEADS}{name}": p for name, p in self.heads.named_parameters()}
        visits = Visits(sum(phase.epochs for phase in objective.phases if phase.backbone), len(instances))
        self.state = FitState(checkpoint, self.trained, visits)
        self.kept: Tensor | None = None
        self.saved = time.monotonic()

    def go(self) -> Visits:
        done, epoch, seen = self._begin(), 0, 0
        for phase in self.objective.phases:
            if phase.epochs and done < (epoch + phase.epochs) * self.per_epoch:
                self._phase(phase, epoch, seen, done)
            epoch += phase.epochs
            seen += phase.epochs if phase.backbone else 0
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.model.eval()
        return self.state.visits

    def _begin(self) -> int:
        """Go on from the checkpoint; from the beginning where the ranks do not all have the same.

        Ranks that see the run directory have its checkpoint, others the one that was last handed on to the storage.
        """
        together = self.rank.world > 1 and distributed.is_initialized()
        first = {name: p.detach().clone() for name, p in self.trained.items()} if together else {}
        done = self.state.restore()
        if not together:
            return done
        at = torch.tensor([done, -done], device=self.device)
        distributed.all_reduce(at, distributed.ReduceOp.MIN)
        if int(at[0]) == -int(at[1]):
            return done
        with torch.no_grad():
            for name, value in first.items():
                self.trained[name].copy_(value)
        self.state.visits.flags.fill(0)
        return 0

    def _phase(self, phase: Phase, first_epoch: int, seen: int, done: int) -> None:
        """Do the updates of a phase; ``done`` of all are, ``seen`` epochs before it trained the backbone."""
        settings, begin = self.settings, first_epoch * self.per_epoch
        self._freeze(phase)
        module = self.wrap(PhaseModule(self.model, self.heads, phase))
        active = {name: p for name, p in self.trained.items() if p.requires_grad}
        optimizer = torch.optim.AdamW(_groups(active, settings))
        if done > begin:
            self.state.restore_optimizer(optimizer)
        states = None if phase.backbone else self._frozen()
        length = phase.epochs * self.per_epoch
        for update, group in self._groups_of_rows(max(done, begin), begin + length):
            step, epoch = update - begin, update // self.per_epoch
            torch.manual_seed(derive_seed(self.seed, "update", update, self.rank.index))
            optimizer.zero_grad(set_to_none=True)
            total_loss, total_ce, correct = 0.0, 0.0, []
            for rows in group:
                labels = self._here(torch.tensor(self.instances.labels[rows]))
                batch = self._batch(rows, states)
                with self.autocast():
                    loss, ce, right = module(batch, labels, step)
                (loss / len(group)).backward()
                total_loss += float(loss.detach()) / len(group)
                total_ce += float(ce) / len(group)
                correct.append(right)
            if not math.isfinite(total_loss):
                raise UserError(
                    f"the training loss is {total_loss} at update {update + 1}; lower the learning rate "
                    f"(now {settings.lr}) or use precision=float32"
                )
            if phase.backbone:
                rows, right = _of_all_ranks(np.concatenate(group), torch.cat(correct), self.rank)
                self.state.visits.record(epoch - first_epoch + seen, rows, right)
            norm = float(nn.utils.clip_grad_norm_(list(active.values()), settings.clip))
            factor = _linear_decay(step, length, settings.warmup)
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["peak"] * factor
            with kept_exits(self.model, phase):
                optimizer.step()
            peak = settings.lr if phase.backbone else settings.head_lr
            values = {"loss": total_loss, "last_exit_loss": total_ce, "gradient_norm": norm, "lr": peak * factor}
            self.on_update(update + 1, self.total, (update + 1) / self.per_epoch, values)
            self._checkpoint(optimizer, update + 1)
        if self.rank.world > 1:
            del module
            gc.collect()  # the wrapper's hooks on the parameters go with it

    def _freeze(self, phase: Phase) -> None:
        self.model.train()
        if not phase.backbone:
            self.model.backbone.eval()  # type: ignore[union-attr]
        if phase.exits == "none":
            self.model.exits.eval()  # type: ignore[union-attr]
        for name, parameter in self.trained.items():
            if name.startswith(HEADS):
                parameter.requires_grad_(phase.heads)
            elif name.startswith("exits."):
                parameter.requires_grad_(phase.exits != "none")
            else:
                parameter.requires_grad_(phase.backbone)

    def _frozen(self) -> Tensor | None:
        """States of all instances, once the backbone rests; with several ranks each would compute those of all."""
        if self.kept is None and self.rank.world == 1:
            self.kept = frozen_states(self.model, self.instances, self.autocast, self.device)
        return self.kept

    def _batch(self, rows: npt.NDArray[np.int64], states: Tensor | None) -> dict[str, Tensor] | Tensor:
        if states is not None:
            return self._here(states[torch.from_numpy(rows)])
        return {name: self._here(value) for name, value in self.instances.batch(rows).items()}

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.device) if self.device is not None else value

    def _checkpoint(self, optimizer: torch.optim.Optimizer, done: int) -> None:
        due = time.monotonic() - self.saved > CHECKPOINT_SECONDS or done % self.per_epoch == 0
        if self.rank.index == 0 and done < self.total and due:
            self.state.save(optimizer, done)
            self.saved = time.monotonic()

    def _groups_of_rows(self, start: int, end: int) -> Iterator[tuple[int, list[npt.NDArray[np.int64]]]]:
        """Yield (update, its batches of rows) for the updates from ``start`` to before ``end``."""
        settings, data, rank = self.settings, self.instances, self.rank
        for epoch in range(start // self.per_epoch, -(-end // self.per_epoch)):
            batches = list(
                shuffled_batches(
                    len(data), settings.batch_size, self.seed, epoch, rank.index, rank.world, lengths=data.lengths
                )
            )
            for index in range(self.per_epoch):
                update = epoch * self.per_epoch + index
                if update >= start:
                    yield update, batches[index * settings.accumulate : (index + 1) * settings.accumulate]


def _of_all_ranks(
    rows: npt.NDArray[np.int64], correct: Tensor, rank: Rank
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers and flags [B] of the update on all ranks together."""
    if rank.world == 1:
        return rows, correct.cpu().numpy().astype(np.int64)
    mine = 2 * torch.from_numpy(rows).to(correct.device) + correct
    packed = [torch.empty_like(mine) for _ in range(rank.world)]
    torch.distributed.all_gather(packed, mine)
    both = torch.cat(packed).cpu().numpy()
    return both // 2, both % 2


def bfloat16_is_native() -> bool:
    """Whether this processor computes in bfloat16 (AVX512-BF16 or AMX), as torch reports it."""
    read = getattr(torch.cpu, "get_capabilities", None)
    found = read() if read is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def precision_context(precision: str, device: torch.device | None) -> Callable[[], Any]:
    """A factory of autocast contexts for ``auto``, ``float32`` or ``bfloat16``."""
    kind = device.type if device else "cpu"
    native = torch.cuda.is_bf16_supported() if kind == "cuda" else bfloat16_is_native()
    enabled = precision == "bfloat16" or (precision == "auto" and native)
    return lambda: torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled)


def _updates_per_epoch(count: int, settings: OptimSettings, world: int) -> int:
    if count < world:
        raise UserError(f"{count} training instances cannot be shared among {world} workers")
    return math.ceil(count_batches(count, settings.batch_size, world) / settings.accumulate)


def _groups(trained: Mapping[str, nn.Parameter], settings: OptimSettings) -> list[dict[str, Any]]:
    """Exits and heads have a rate of their own; weight decay is on matrices only, as usual for transformers."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        is_matrix = parameter.ndim > 1 and not name.endswith("bias")
        groups.setdefault((name.startswith(("exits.", HEADS)), is_matrix), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": settings.head_lr if is_head else settings.lr,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for (is_head, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _linear_decay(update: int, total: int, warmup: float) -> float:
    """Factor of the peak rate: rises over the first ``warmup * total`` updates, then falls to 0."""
    rising = round(total * warmup)
    if update < rising:
        return (update + 1) / (rising + 1)
    return (total - update) / max(1, total - rising)


__all__ = ["OptimSettings", "Rank", "exit_losses", "fit", "precision_context"]
