"""The limit: a single-process torch loop without any framework, on the same data with the same policy.

It does what the mathematics asks for and nothing else: gather a batch of states, one policy pass, one draw from the
exit distribution, rewards by index; with an update also advantages, loss, backward pass and Adam. No RLlib, no actors,
no metrics, no seeds per block, no checks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.envs.state_store import StateStore
from rl_exit.method import rewards
from rl_exit.models.policy import PolicyHeads


class BareLoop:
    """Sampling, or sampling and policy gradient, over shuffled epochs of a store.

    Args:
        store: N instances.
        policy: Heads that are sampled from, and trained by :meth:`train`.
        batch_size: B, instances per batch.
        trajectories: K per instance.
        epsilon: Exploration.
        alpha: Price of a layer, nats.
        lr: Learning rate.
        clip: Largest gradient norm.
    """

    def __init__(
        self,
        store: StateStore,
        policy: PolicyHeads,
        *,
        batch_size: int,
        trajectories: int,
        epsilon: float,
        alpha: float = 0.05,
        lr: float = 1e-3,
        clip: float = 1.0,
    ) -> None:
        self.store = store
        self.policy = policy
        self.batch_size = batch_size
        self.trajectories = trajectories
        self.epsilon = epsilon
        self.clip = clip
        self._rewards = torch.from_numpy(rewards(store.losses, store.memorized(), alpha, "hardness"))
        self._optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
        self._generator = torch.Generator().manual_seed(0)
        self._rng = np.random.default_rng(0)
        self._order = self._rng.permutation(store.num_instances)
        self._next = 0

    def sample(self, batches: int) -> int:
        """Draw the trajectories of some batches; returns the layers visited."""
        steps = 0
        with torch.no_grad():
            for _ in range(batches):
                rows, states = self._batch()
                index, _ = self._draw(self.policy(states), rows)
                steps += int(index.sum()) + index.numel()
        return steps

    def train(self, batches: int) -> int:
        """The same with one policy gradient update each (leave-one-out baseline, importance weights)."""
        steps = 0
        for _ in range(batches):
            rows, states = self._batch()
            logits = self.policy(states)
            index, (log_prob, reward) = self._draw(logits.detach(), rows)
            number = self.trajectories
            advantage = (reward - reward.mean(1, keepdim=True)) * (number / (number - 1))
            leave, stay = F.logsigmoid(logits), F.logsigmoid(-logits)
            log_pi = (F.pad(stay.cumsum(1), (1, 0)) + F.pad(leave, (0, 1))).gather(1, index)
            weight = advantage * (log_pi.detach() - log_prob).exp()
            loss = -(weight * log_pi).mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip)
            self._optimizer.step()
            steps += int(index.sum()) + index.numel()
        return steps

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Rows [B] and states [B, L, H] of the next batch."""
        if self._next >= len(self._order):
            self._order, self._next = self._rng.permutation(self.store.num_instances), 0
        rows = self._order[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return torch.from_numpy(rows), torch.from_numpy(self.store.states(rows))

    def _draw(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Exit layers as indices 0..L-1, (log-probabilities, rewards), all [B, K]."""
        pi = (1.0 - self.epsilon) * logits.sigmoid() + 0.5 * self.epsilon
        probability = F.pad((1.0 - pi).cumprod(1), (1, 0), value=1.0) * F.pad(pi, (0, 1), value=1.0)
        uniform = torch.rand((len(rows), self.trajectories), generator=self._generator)
        index = torch.searchsorted(probability.cumsum(1)[:, :-1].contiguous(), uniform, right=True)
        return index, (probability.log().gather(1, index), self._rewards[rows].gather(1, index))
