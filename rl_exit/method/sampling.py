"""Whole trajectories for a block of instances from one policy pass (Eq. 5).

Since the states of a frozen model are known, a trajectory is its exit layer: P(exit at l) is drawn from at once and
must equal, in distribution and reward, stepping the Gymnasium environment (a test holds them together). numpy alone:
sampling processes do without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Trajectories:
    """K trajectories of each of B instances, columnar: about 9 bytes a trajectory.

    Attributes:
        instance: [B] int32, row of the instance in the state store.
        exit_layer: [B, K] uint8, 1..L.
        log_prob: [B, K] float32, log-probability under the policy that drew it (exploration included).
        reward: [B, K] float32, the return (one reward, on exit).
    """

    instance: npt.NDArray[np.int32]
    exit_layer: npt.NDArray[np.uint8]
    log_prob: npt.NDArray[np.float32]
    reward: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.exit_layer.shape
        if (
            len(shape) != 2
            or self.instance.shape != shape[:1]
            or self.log_prob.shape != shape
            or self.reward.shape != shape
        ):
            raise ValueError(
                f"Trajectories: instance {self.instance.shape}, exit_layer {shape}, log_prob {self.log_prob.shape}, "
                f"reward {self.reward.shape}; accepted: [B], [B, K], [B, K], [B, K]"
            )

    def __len__(self) -> int:
        """Number of trajectories, B*K."""
        return int(self.exit_layer.size)

    @property
    def num_steps(self) -> int:
        """Environment steps these trajectories stand for: an exit at l < L takes l actions, an exit at L takes L-1.

        Counted as the exit layer (layers visited), the unit of the sampling benchmark.
        """
        return int(self.exit_layer.sum(dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return self.instance.nbytes + self.exit_layer.nbytes + self.log_prob.nbytes + self.reward.nbytes


def explore(pi: Any, epsilon: float) -> Any:
    """Exit probabilities under epsilon-greedy exploration: with chance epsilon the action is uniformly random.

    Args:
        pi: [..., L-1], array or tensor.
        epsilon: In [0, 1].
    """
    return pi if epsilon == 0.0 else (1.0 - epsilon) * pi + 0.5 * epsilon


def exit_probability(exit_logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """pi from the log-odds of Exit, in double precision: products of many 1 - pi keep their digits."""
    with np.errstate(over="ignore"):  # exp(large) is inf and pi is then 0, which is right
        return 1.0 / (1.0 + np.exp(-exit_logits.astype(np.float64)))


def sample_trajectories(
    pi: npt.NDArray[np.floating],
    reward: npt.NDArray[np.float32],
    instance: npt.NDArray[np.int32],
    trajectories: int,
    epsilon: float,
    generator: np.random.Generator,
) -> Trajectories:
    """Draw K trajectories for each instance of a block.

    Args:
        pi: [B, L-1], probability of Exit of the current policy.
        reward: [B, L], reward of leaving at each layer.
        instance: [B], rows in the state store.
        trajectories: K.
        epsilon: Exploration, in [0, 1].
        generator: Source of randomness; its state alone decides the draw.

    Raises:
        ValueError: L > 255, which an exit layer of one byte cannot hold.
    """
    count, layers = reward.shape
    if layers > 255:
        raise ValueError(f"sample_trajectories: L = {layers}; accepted: at most 255")
    leave = explore(pi.astype(np.float64), epsilon)
    probability = np.ones((count, layers))
    np.cumprod(1.0 - leave, axis=1, out=probability[:, 1:])  # of reaching each layer
    probability[:, :-1] *= leave
    uniform = generator.random((count, trajectories))
    # Compared layer by layer with the cumulative probabilities; the last layer takes what rounding leaves.
    index = np.zeros((count, trajectories), dtype=np.uint8)
    for bound in np.cumsum(probability[:, :-1], axis=1).T:
        index += uniform >= bound[:, None]
    flat = index + np.arange(0, count * layers, layers)[:, None]
    return Trajectories(
        instance=instance,
        exit_layer=index + np.uint8(1),
        log_prob=np.log(np.maximum(probability, 1e-45)).astype(np.float32).ravel()[flat],
        reward=reward.astype(np.float32, copy=False).ravel()[flat],
    )


def advantages(reward: npt.NDArray[np.float32], baseline: str = "leave_one_out") -> npt.NDArray[np.float32]:
    """Return minus baseline within each instance's K trajectories.

    Args:
        reward: [B, K].
        baseline: ``"leave_one_out"``: mean of the K-1 others, unbiased; ``"mean"``: mean of all K, the paper's, which
            shrinks the expected gradient by (K-1)/K.

    Raises:
        ValueError: K < 2 or an unknown baseline.
    """
    count = reward.shape[1]
    if count < 2:
        raise ValueError("a baseline over an instance's trajectories needs K >= 2")
    centred = reward - reward.mean(axis=1, keepdims=True)
    if baseline == "mean":
        return centred
    if baseline == "leave_one_out":
        return (centred * np.float32(count / (count - 1))).astype(np.float32)
    raise ValueError(f"baseline '{baseline}' is unknown; accepted: leave_one_out, mean")
