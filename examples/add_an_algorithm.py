"""Add an RL algorithm: REINFORCE with a moving-average baseline, from this file, by its dotted path.

Run:     python examples/add_an_algorithm.py runs/docstrings
Expect:  mean return at first and at last, of this algorithm and of PG after as many trajectories. Both
         rise; PG goes further, because its baseline belongs to the instance and leaves less noise.

What an algorithm needs: a learner that makes a loss of a block of trajectories, its settings, a class that names them.
In a run: PYTHONPATH=examples rl-exit train algorithm=add_an_algorithm.MovingBaseline
"""

import sys
from pathlib import Path

import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.method import policy_gradient_loss
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, train_policy
from rl_exit.trainers.rllib.algorithm import ExitAlgorithm, ExitConfig
from rl_exit.trainers.rllib.learner import ColumnarLearner


class MovingBaselineLearner(ColumnarLearner):
    """``-(1/BK) sum_k (R_k - b) log P(exit at e_k)``; b follows the mean return, a tenth of the way each update."""

    def build(self):
        """Start without a baseline."""
        super().build()
        self.baseline = None

    def learn(self, block):
        """One update from B instances with K trajectories each."""
        logits = self.exit_logits(block)  # [B, L-1], with graph
        mean = float(block.reward.mean())
        self.baseline = mean if self.baseline is None else 0.9 * self.baseline + 0.1 * mean
        self.descend(policy_gradient_loss(logits, block.exit_layer, block.reward - self.baseline))
        return logits.detach(), {"baseline": torch.tensor(self.baseline)}  # scalars end up in the metrics


class MovingBaselineConfig(ExitConfig):
    """Its settings: those of every algorithm, and which learner."""

    def get_default_learner_class(self):
        """The learner."""
        return MovingBaselineLearner


class MovingBaseline(ExitAlgorithm):
    """What ``algorithm=`` names."""

    @classmethod
    def get_default_config(cls):
        """The settings."""
        return MovingBaselineConfig(algo_class=cls)


def main(run: str) -> None:
    """Train on the last round's state store."""
    store = StateStore.open(sorted(Path(run).glob("rounds/*/store-train"))[-1])
    torch.manual_seed(0)
    start = PolicyHeads(store.num_layers, store.hidden_size, width=16).state_dict()
    for algorithm in ("add_an_algorithm.MovingBaseline", "pg"):
        settings = PolicyPhaseSettings(algorithm=algorithm, width=16, epochs=20, batch_size=64, lr=1e-2, epsilon=0.0)
        rows = train_policy(store.path, start, settings).rows
        print(f"{algorithm}: return {rows[0]['return']:.3f} at first, {rows[-1]['return']:.3f} at last")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/docstrings")
