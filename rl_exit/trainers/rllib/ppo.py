"""PPO per instance: policy and value once per (instance, layer), whatever the number of trajectories.

For a given (instance, layer, action) the probability ratio r is the same in all K trajectories, only the advantage
differs. The clipped objective ``min(A r, A clip(r))`` is ``A min(r, 1+c)`` for A > 0 and ``A max(r, 1-c)`` for A < 0,
so the K advantages fold into a positive and a negative weight per (instance, layer, action); the squared value error
folds into count, sum and sum of squares of the returns. Loss and gradient equal RLlib's PPO on the unfolded steps (a
test holds them together).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.method import exit_distribution, explore
from rl_exit.trainers.rllib.algorithm import ExitAlgorithm, ExitConfig
from rl_exit.trainers.rllib.learner import Block, ColumnarLearner
from rl_exit.trainers.rllib.module import EXIT_LOGITS, STATES, VALUES


@dataclass(frozen=True)
class FoldedSteps:
    """The steps of K trajectories of each instance, folded; all [B, L-1] unless stated.

    Attributes:
        leave_gain: Sum of the positive advantages of Exit.
        leave_loss: Sum of the magnitudes of the negative ones.
        stay_gain: The same for Continue.
        stay_loss: The same for Continue.
        leave_log_prob: Log-probability of Exit under the behaviour policy.
        stay_log_prob: The same of Continue.
        count: Steps taken at the layer.
        target_sum: Sum of their returns.
        target_squares: Sum of the squared returns.
    """

    leave_gain: Tensor
    leave_loss: Tensor
    stay_gain: Tensor
    stay_loss: Tensor
    leave_log_prob: Tensor
    stay_log_prob: Tensor
    count: Tensor
    target_sum: Tensor
    target_squares: Tensor

    def take(self, index: Tensor) -> FoldedSteps:
        """The steps of some of the instances."""
        return FoldedSteps(**{name: value[index] for name, value in vars(self).items()})


def step_advantages(
    exit_layer: Tensor, reward: Tensor, values: Tensor, total: Callable[[Tensor], Tensor] = lambda value: value
) -> tuple[Tensor, Tensor]:
    """Advantages of every step, standardised over the steps that were taken.

    The only reward comes at the end of at most L-1 actions and nothing is discounted, so with lambda = 1 (RLlib's
    default) the advantage of a step at layer l is ``R - V_l``.

    Args:
        exit_layer: [B, K].
        reward: [B, K].
        values: [B, L-1].
        total: Sums a statistic over all learners.

    Returns:
        (advantages [B, K, L-1], mask [B, K, L-1] bool of the steps taken).
    """
    layers = torch.arange(1, values.shape[1] + 1, device=values.device)
    taken = layers <= exit_layer.unsqueeze(-1)
    advantage = reward.unsqueeze(-1) - values.unsqueeze(1)
    count, first = total(torch.stack([taken.sum().to(advantage.dtype), (advantage * taken).sum()]))
    centred = advantage - first / count
    variance = total((centred * taken).square().sum()) / (count - 1).clamp_min(1.0)
    return centred / variance.sqrt().clamp_min(1e-4), taken


def trajectory_weights(pi: Tensor, exit_layer: Tensor, log_prob: Tensor) -> Tensor:
    """P(trajectory) under ``pi`` over that under the weights that drew it, [B, K]: 1 if they are the same.

    PPO limits the change against ``pi``, the policy at the start of the update. Where trajectories come from older
    weights, they are weighted to stand for trajectories of ``pi`` (the decoupled objective of Hilton et al. 2021).

    Args:
        pi: [B, L-1], exploration included.
        exit_layer: [B, K].
        log_prob: [B, K].
    """
    return exit_distribution(pi.double()).gather(1, exit_layer - 1).log().sub(log_prob).exp().float()


def fold_steps(
    exit_layer: Tensor,
    reward: Tensor,
    advantage: Tensor,
    taken: Tensor,
    pi: Tensor,
    weight: Tensor | None = None,
) -> FoldedSteps:
    """Fold the steps of K trajectories.

    Args:
        exit_layer: [B, K].
        reward: [B, K].
        advantage: [B, K, L-1].
        taken: [B, K, L-1].
        pi: [B, L-1], probability of Exit under the behaviour policy.
        weight: [B, K], how often each trajectory counts; None: once.
    """
    layers = torch.arange(1, pi.shape[1] + 1, device=pi.device)
    leave = layers == exit_layer.unsqueeze(-1)
    counted = taken.to(pi.dtype) if weight is None else taken * weight.unsqueeze(-1)
    gain, loss = advantage.clamp_min(0.0) * counted, (-advantage).clamp_min(0.0) * counted
    stay = taken & ~leave
    returns = reward.unsqueeze(-1)
    return FoldedSteps(
        leave_gain=(gain * leave).sum(1),
        leave_loss=(loss * leave).sum(1),
        stay_gain=(gain * stay).sum(1),
        stay_loss=(loss * stay).sum(1),
        leave_log_prob=pi.log(),
        stay_log_prob=torch.log1p(-pi),
        count=counted.sum(1),
        target_sum=(returns * counted).sum(1),
        target_squares=(returns.square() * counted).sum(1),
    )


def ppo_loss(
    logits: Tensor,
    values: Tensor,
    steps: FoldedSteps,
    *,
    clip: float,
    value_coefficient: float,
    entropy: float,
    count: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss, mean over the steps.

    Args:
        logits: [B, L-1].
        values: [B, L-1].
        steps: What was done.
        clip: Largest change of the ratio.
        value_coefficient: Weight of the squared value error.
        entropy: Bonus on the entropy of the actions.
        count: Number of steps to divide by; default those of ``steps``.

    Returns:
        (loss, detached parts).
    """
    leave, stay = F.logsigmoid(logits), F.logsigmoid(-logits)
    leave_ratio, stay_ratio = (leave - steps.leave_log_prob).exp(), (stay - steps.stay_log_prob).exp()
    surrogate = (
        steps.leave_gain * leave_ratio.clamp_max(1 + clip)
        - steps.leave_loss * leave_ratio.clamp_min(1 - clip)
        + steps.stay_gain * stay_ratio.clamp_max(1 + clip)
        - steps.stay_loss * stay_ratio.clamp_min(1 - clip)
    ).sum()
    error = (steps.count * values.square() - 2 * values * steps.target_sum + steps.target_squares).sum()
    number = (steps.count.sum() if count is None else count).clamp_min(1.0)
    loss = -surrogate + value_coefficient * error
    if entropy > 0.0:
        loss = loss - entropy * (-(leave.exp() * leave + stay.exp() * stay) * steps.count).sum()
    parts = {"policy_loss": (-surrogate / number).detach(), "value_loss": (error / number).detach()}
    return loss / number, parts


class PPOExitLearner(ColumnarLearner):
    """Several passes over each batch, in minibatches of whole instances."""

    def prepare(self, block: Block, out: dict[str, Tensor]) -> FoldedSteps:
        """The steps of a batch, given the module's outputs under the weights that drew it."""
        with torch.no_grad():
            pi = explore(out[EXIT_LOGITS].double().sigmoid(), block.batch.epsilon).float().clamp(1e-7, 1 - 1e-7)
            advantage, taken = step_advantages(block.exit_layer, block.reward, out[VALUES], self.total)
            weight = trajectory_weights(pi, block.exit_layer, block.log_prob) if block.batch.lag else None
            return fold_steps(block.exit_layer, block.reward, advantage, taken, pi, weight)

    def learn(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """``ppo_epochs`` passes."""
        # The number of minibatches must agree between learners, whose parts may differ by an instance.
        learners = max(1, self.config.num_learners)
        instances = block.batch.total / block.exit_layer.shape[1] / learners
        number = max(1, round(instances / self.config.minibatch_size))
        with torch.set_grad_enabled(number == 1):
            out = self.forward(block.states) if number == 1 else self.exit_module._forward({STATES: block.states})
        steps = self.prepare(block, out)
        before, explained = out[EXIT_LOGITS].detach(), explained_variance(steps, out[VALUES].detach())
        parts: dict[str, Tensor] = {}
        if number == 1:
            # The first pass has the outputs already.
            parts = self._minibatch(out, steps)
            for _ in range(self.config.ppo_epochs - 1):
                parts = self._minibatch(self.forward(block.states), steps)
        else:
            generator = torch.Generator().manual_seed(self._weights_seq_no)
            for _ in range(self.config.ppo_epochs):
                for index in torch.randperm(len(block.states), generator=generator).tensor_split(number):
                    parts = self._minibatch(self.forward(block.states[index]), steps.take(index))
        return before, {**parts, "explained_variance": explained}

    def _minibatch(self, out: dict[str, Tensor], steps: FoldedSteps) -> dict[str, Tensor]:
        loss, parts = ppo_loss(
            out[EXIT_LOGITS],
            out[VALUES],
            steps,
            clip=self.config.ppo_clip,
            value_coefficient=self.config.value_coefficient,
            entropy=self.config.entropy,
            # DDP averages the learners' gradients, so each divides by the mean number of steps.
            count=self.total(steps.count.sum()) / max(1, self.config.num_learners),
        )
        self.descend(loss)
        return parts


def explained_variance(steps: FoldedSteps, values: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the steps taken; 0 is no better than a constant."""
    number = steps.count.sum().clamp_min(1.0)
    mean = steps.target_sum.sum() / number
    variance = steps.target_squares.sum() / number - mean.square()
    residual = (steps.target_sum - values * steps.count).sum() / number
    squares = (steps.target_squares - 2 * values * steps.target_sum + steps.count * values.square()).sum() / number
    return 1 - (squares - residual.square()) / variance.clamp_min(1e-12)


class PPOExitConfig(ExitConfig):
    """Settings of PPO."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or PPOExit)
        self.critic = True
        self.ppo_clip = 0.2
        self.ppo_epochs = 4
        self.value_coefficient = 0.5

    def get_default_learner_class(self) -> type:
        """The learner."""
        return PPOExitLearner


class PPOExit(ExitAlgorithm):
    """Proximal policy optimisation with a value head per layer."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return PPOExitConfig()
