from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rl_exit.envs import CONTINUE, EXIT, EarlyExitEnv, EarlyExitVectorEnv, StateStore, StateStoreWriter
from rl_exit.method import (
    Trajectories,
    advantages,
    exit_distribution,
    expected_return,
    explore,
    folded_weights,
    importance_weights,
    log_exit_distribution,
    policy_gradient_loss,
    rewards,
    sample_trajectories,
)

SURE = 1e-6  # a fair draw fails a test once in a million seeds, and the seeds are fixed
LAYERS = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def philox(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_pi(rows: int = 4, layers: int = LAYERS, seed: int = 0) -> Tensor:
    return (1.2 * torch.randn(rows, layers - 1, generator=seeded(seed), dtype=torch.float64) - 0.8).sigmoid()


def draw(pi: Tensor, reward: Tensor | None = None, count: int = 8, epsilon: float = 0.0, seed: int = 0) -> Trajectories:
    reward = torch.zeros(pi.shape[0], pi.shape[1] + 1) if reward is None else reward
    return sample_trajectories(
        pi.numpy(), reward.numpy(), np.arange(len(pi), dtype=np.int32), count, epsilon, philox(seed)
    )


def counts(exit_layer: np.ndarray, layers: int = LAYERS) -> np.ndarray:
    return np.bincount(exit_layer.reshape(-1), minlength=layers + 1)[1:]


def fits(observed: np.ndarray, probability: Tensor) -> float:
    return float(stats.chisquare(observed, probability.numpy() / float(probability.sum()) * observed.sum()).pvalue)


# --- the draw


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_exits_follow_the_exact_distribution(epsilon: float) -> None:
    pi = random_pi()
    drawn = draw(pi, count=40_000, epsilon=epsilon)
    for row in range(len(pi)):
        # Explored exit probabilities by definition: a uniformly random action with chance epsilon.
        behaviour = torch.tensor([(1 - epsilon) * p + epsilon / 2 for p in pi[row].tolist()], dtype=torch.float64)
        observed = counts(drawn.exit_layer[row])
        assert fits(observed, exit_distribution(behaviour)) > SURE
        off = behaviour.clone()
        off[1] += 0.03
        assert fits(observed, exit_distribution(off)) < SURE


def test_a_draw_of_each_uniform_number_by_hand() -> None:
    pi = torch.tensor([[0.5, 0.25]])  # P = .5, .125, .375
    drawn = draw(pi, count=1000, seed=3)
    uniform = philox(3).random((1, 1000))[0]
    expected = [1 if u < 0.5 else 2 if u < 0.625 else 3 for u in uniform.tolist()]
    assert drawn.exit_layer[0].tolist() == expected


def test_certain_exits_and_impossible_ones() -> None:
    pi = torch.tensor([[1.0, 0.3, 0.3], [0.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
    drawn = draw(pi, count=500)
    assert [set(row.tolist()) for row in drawn.exit_layer] == [{1}, {2}, {4}]
    assert (drawn.log_prob == 0).all()


def test_log_probabilities_and_rewards_are_those_of_the_exit() -> None:
    pi, reward = random_pi(), torch.randn(4, LAYERS, generator=seeded(1))
    drawn = draw(pi, reward, count=50, epsilon=0.2)
    behaviour = exit_distribution(0.8 * pi + 0.1).log()
    for row in range(4):
        for k in range(50):
            layer = int(drawn.exit_layer[row, k])
            assert drawn.log_prob[row, k] == pytest.approx(float(behaviour[row, layer - 1]), abs=1e-6)
            assert drawn.reward[row, k] == reward[row, layer - 1].item()  # exact
    assert not np.allclose(drawn.log_prob, draw(pi, reward, count=50).log_prob[:, :50], atol=1e-6)


def test_more_layers_than_a_byte_holds_are_refused() -> None:
    assert set(draw(torch.zeros(1, 254), count=3).exit_layer[0].tolist()) == {255}
    with pytest.raises(ValueError, match=r"L = 256; accepted: at most 255"):
        draw(torch.zeros(1, 255))


def test_the_generator_alone_decides() -> None:
    pi = random_pi()
    first, again, other = draw(pi, seed=1), draw(pi, seed=1), draw(pi, seed=2)
    np.random.seed(99)
    assert np.array_equal(first.exit_layer, again.exit_layer)
    assert not np.array_equal(first.exit_layer, other.exit_layer)


def test_types_and_size() -> None:
    drawn = draw(random_pi(4), count=8)
    kinds = (drawn.instance.dtype, drawn.exit_layer.dtype, drawn.log_prob.dtype, drawn.reward.dtype)
    assert kinds == (np.int32, np.uint8, np.float32, np.float32)
    assert len(drawn) == 32 and drawn.num_steps == int(drawn.exit_layer.astype(int).sum())
    assert drawn.nbytes / len(drawn) <= 16  # bytes of a trajectory between processes
    with pytest.raises(ValueError, match=r"accepted: \[B\], \[B, K\], \[B, K\], \[B, K\]"):
        Trajectories(drawn.instance[:2], drawn.exit_layer, drawn.log_prob, drawn.reward)


def test_explore() -> None:
    pi = torch.tensor([0.0, 0.4, 1.0])
    assert explore(pi, 0.0) is pi
    assert explore(pi, 0.5).tolist() == pytest.approx([0.25, 0.45, 0.75])
    assert explore(pi, 1.0).tolist() == [0.5, 0.5, 0.5]


# --- the environment is the specification


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    rng = np.random.default_rng(4)
    path: Path = tmp_path_factory.mktemp("sampling") / "store"
    with StateStoreWriter(path, LAYERS, 3, 2, shard_size=3) as writer:
        writer.append(
            ids=np.arange(4),
            labels=rng.integers(0, 2, 4),
            states=rng.standard_normal((4, LAYERS, 3)),
            losses=rng.exponential(size=(4, LAYERS)),
            correct=rng.random((4, LAYERS)) > 0.3,
            logits=rng.standard_normal((4, LAYERS, 2)),
        )
    return StateStore.open(path)


def stepped(
    env: EarlyExitEnv, policy: Callable[[np.ndarray, int], float], row: int, count: int
) -> list[tuple[int, float]]:
    """Play episodes action by action, the policy reading the observation; (exit layer, return) of each."""
    rng = np.random.default_rng(row)
    result = []
    for _ in range(count):
        observation, _ = env.reset(options={"instance": row})
        ended, total, info = False, 0.0, {}
        while not ended:
            leave = rng.random() < policy(observation["state"], int(observation["layer"]))
            observation, reward, ended, _, info = env.step(EXIT if leave else CONTINUE)
            total += reward
        result.append((info["exit_layer"], total))
    return result


@pytest.mark.parametrize("kind", ["hardness", "vanilla"])
def test_the_sampler_equals_stepping_the_environment(small_store: StateStore, kind: str) -> None:
    weights = np.random.default_rng(0).standard_normal((LAYERS, 3))

    def policy(state: np.ndarray, layer: int) -> float:
        return 1 / (1 + math.exp(0.5 - float(weights[layer - 1] @ state)))

    block = small_store.block(np.arange(4))
    table = torch.from_numpy(rewards(block.losses, block.memorized(), 0.1, kind))
    pi = torch.tensor([[policy(block.states[i, j], j + 1) for j in range(LAYERS - 1)] for i in range(4)])
    drawn = draw(pi, table, count=4000)
    env = EarlyExitEnv(small_store, kind, alpha=0.1)
    for row in range(4):
        episodes = stepped(env, policy, row, 2000)
        exits = np.array([layer for layer, _ in episodes])
        both = np.stack([counts(exits), counts(drawn.exit_layer[row])])
        both = both[:, both.sum(0) > 0]
        assert stats.chi2_contingency(both).pvalue > SURE
        assert fits(counts(exits), exit_distribution(pi[row].double())) > SURE
        shifted = np.stack([counts(exits), np.roll(counts(drawn.exit_layer[row]), 1)])
        assert stats.chi2_contingency(shifted[:, shifted.sum(0) > 0]).pvalue < SURE
        # Rewards: the same number to the last bit for the same exit.
        by_exit = dict(zip(drawn.exit_layer[row].tolist(), drawn.reward[row].tolist(), strict=True))
        seen = dict(episodes)
        assert len(seen) >= 3
        assert {layer: by_exit[layer] for layer in seen if layer in by_exit} == {
            layer: total for layer, total in seen.items() if layer in by_exit
        }


def test_the_sampler_equals_stepping_the_vector_environment(small_store: StateStore) -> None:
    pi = random_pi(4, seed=6)
    block = small_store.block(np.arange(4))
    table = torch.from_numpy(rewards(block.losses, block.memorized(), 0.1))
    drawn = draw(pi, table, count=4000)
    env, rng = EarlyExitVectorEnv(64, small_store, alpha=0.1), np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    seen: list[tuple[int, int, float]] = []
    for _ in range(600):
        chance = np.append(pi.numpy(), np.ones((4, 1)), axis=1)[info["instance"], observation["layer"] - 1]
        observation, reward, ended, _, info = env.step((rng.random(64) < chance).astype(np.int64))
        seen += zip(info["instance"][ended], observation["layer"][ended], reward[ended], strict=True)
    for row in range(4):
        exits = np.array([layer for instance, layer, _ in seen if instance == row])
        assert len(exits) > 1500
        assert stats.chi2_contingency(np.stack([counts(exits), counts(drawn.exit_layer[row])])).pvalue > SURE
        assert fits(counts(exits), exit_distribution(pi[row])) > SURE
    assert all(reward == float(table[row, layer - 1]) for row, layer, reward in seen)


# --- advantages and folding


def test_advantages_by_hand() -> None:
    reward = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], dtype=np.float32)
    # leave-one-out means of the others: 4, 3.5, 1.5; mean of all: 3
    np.testing.assert_allclose(advantages(reward), [[-3.0, -1.5, 4.5], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(advantages(reward, "mean"), [[-2.0, -1.0, 3.0], [0, 0, 0]], atol=1e-6)


def test_advantages_equal_the_slow_twin() -> None:
    reward = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    expected = [
        [r - sum(v for j, v in enumerate(row) if j != k) / 6 for k, r in enumerate(row)] for row in reward.tolist()
    ]
    result = advantages(reward)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(advantages(reward, "mean"), expected, atol=1e-5)


def test_advantages_refuse() -> None:
    with pytest.raises(ValueError, match="needs K >= 2"):
        advantages(np.zeros((3, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="baseline 'median' is unknown; accepted: leave_one_out, mean"):
        advantages(np.zeros((3, 2), dtype=np.float32), "median")


def slow_log_prob(logits: Tensor, exit_layer: int) -> Tensor:
    """Step by step: every Continue below the exit, then Exit; nothing is credited at L."""
    total = logits.new_zeros(())
    for layer in range(1, exit_layer):
        total = total + torch.log(1 - torch.sigmoid(logits[layer - 1]))
    if exit_layer <= len(logits):
        total = total + torch.log(torch.sigmoid(logits[exit_layer - 1]))
    return total


def test_folded_weights_by_hand() -> None:
    leave, stay = folded_weights(torch.tensor([[1, 3, 2, 3]]), torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), 3)
    assert leave.tolist() == [[1.0, 100.0]]  # who leaves at 1, at 2
    assert stay.tolist() == [[1110.0, 1010.0]]  # who passes 1, passes 2


@pytest.mark.parametrize("count", [1, 8, 33])
def test_folding_equals_the_sum_over_steps_and_its_gradient(count: int) -> None:
    logits = torch.randn(6, LAYERS - 1, generator=seeded(), dtype=torch.float64).requires_grad_()
    exits = torch.randint(1, LAYERS + 1, (6, count), generator=seeded(1))
    weight = torch.randn(6, count, generator=seeded(2), dtype=torch.float64)
    slow = -sum(weight[i, k] * slow_log_prob(logits[i], int(exits[i, k])) for i in range(6) for k in range(count))
    slow = slow / (6 * count)
    fast = policy_gradient_loss(logits, exits, weight)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    (expected,), (result,) = torch.autograd.grad(slow, logits), torch.autograd.grad(fast, logits)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    off = weight.clone()
    off[0, 0] += 1e-3
    with pytest.raises(AssertionError):
        torch.testing.assert_close(policy_gradient_loss(logits, exits, off), slow, rtol=1e-10, atol=1e-12)


# --- the sampled gradient


def sampled_and_exact_gradient(
    count: int, baseline: str, epsilon: float = 0.0, corrected: bool = True, repeats: int = 30_000
) -> tuple[Tensor, Tensor]:
    """Mean sampled gradient and exact gradient of J in the weights of a linear policy (one per layer)."""
    features, layers, rows = 6, LAYERS, 8
    states = torch.randn(rows, layers - 1, features, generator=seeded(1))
    reward = torch.randn(rows, layers, generator=seeded(2))
    weight = (0.5 * torch.randn(layers - 1, features, generator=seeded(3))).requires_grad_()
    logits = torch.einsum("blf,lf->bl", states, weight) - 0.5
    (exact,) = torch.autograd.grad(expected_return(logits, reward).mean(), weight, retain_graph=True)
    many = logits.repeat(repeats, 1)
    drawn = sample_trajectories(
        many.detach().sigmoid().numpy(),
        reward.repeat(repeats, 1).numpy(),
        np.arange(rows * repeats, dtype=np.int32),
        count,
        epsilon,
        philox(4),
    )
    advantage = torch.from_numpy(advantages(drawn.reward, baseline))
    exits = torch.from_numpy(drawn.exit_layer)
    if corrected:
        advantage = advantage * importance_weights(many, exits, torch.from_numpy(drawn.log_prob))
    (sampled,) = torch.autograd.grad(-policy_gradient_loss(many, exits, advantage), weight)
    return sampled, exact


def cosine_and_length(sampled: Tensor, exact: Tensor) -> tuple[float, float]:
    cosine = torch.nn.functional.cosine_similarity(sampled.flatten(), exact.flatten(), dim=0)
    return float(cosine), float(sampled.norm() / exact.norm())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_leave_one_out_gives_the_exact_gradient(count: int) -> None:
    cosine, length = cosine_and_length(*sampled_and_exact_gradient(count, "leave_one_out"))
    assert cosine > 0.999 and abs(length - 1) < 0.02, (cosine, length)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_own_sample_mean_is_short_by_its_factor(count: int) -> None:
    cosine, length = cosine_and_length(*sampled_and_exact_gradient(count, "mean"))
    assert cosine > 0.999 and abs(length / ((count - 1) / count) - 1) < 0.02, (cosine, length)
    assert abs(length - 1) > 0.1


def test_importance_weights_keep_the_gradient_that_of_pi() -> None:
    cosine, length = cosine_and_length(*sampled_and_exact_gradient(4, "leave_one_out", epsilon=0.3))
    assert cosine > 0.999 and abs(length - 1) < 0.02, (cosine, length)
    cosine, length = cosine_and_length(*sampled_and_exact_gradient(4, "leave_one_out", epsilon=0.3, corrected=False))
    assert cosine < 0.999 or abs(length - 1) > 0.02, (cosine, length)


def test_importance_weights_by_hand_and_their_bound() -> None:
    pi = random_pi(16, seed=2)
    epsilon = 0.3
    drawn = draw(pi, count=64, epsilon=epsilon)
    exits, log_prob = torch.from_numpy(drawn.exit_layer), torch.from_numpy(drawn.log_prob)
    logits = pi.logit().requires_grad_()
    result = importance_weights(logits, exits, log_prob)
    assert not result.requires_grad
    for row, k in ((0, 0), (3, 9), (15, 63)):
        layer, ratio = int(exits[row, k]), 1.0
        for below in range(layer):
            p = float(pi[row, below]) if below < LAYERS - 1 else 1.0
            q = (1 - epsilon) * p + epsilon / 2 if below < LAYERS - 1 else 1.0
            ratio *= p / q if below == layer - 1 else (1 - p) / (1 - q)
        assert float(result[row, k]) == pytest.approx(ratio, rel=1e-5)
    assert 1.0 < float(result.max()) <= (1 - epsilon) ** -(LAYERS - 1)
    unexplored = draw(pi, count=64)
    ones = importance_weights(logits, torch.from_numpy(unexplored.exit_layer), torch.from_numpy(unexplored.log_prob))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-5, atol=1e-5)
    everything = torch.arange(1, LAYERS + 1).repeat(16, 1)
    behaviour = log_exit_distribution(explore(pi, epsilon).logit())
    mean = (behaviour.exp() * importance_weights(logits, everything, behaviour)).sum(1)
    torch.testing.assert_close(mean, torch.ones_like(mean))  # the weights average to one under the behaviour
