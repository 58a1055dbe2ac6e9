"""Losses of the columnar learners against slow twins and against RLlib's own PPO."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from rllib_stores import heads, random_store, reward_table

from rl_exit.envs.state_store import StateStore
from rl_exit.method import exit_distribution, expected_return, explore, sample_trajectories
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm
from rl_exit.trainers.rllib.batch import TrajectoryBatch
from rl_exit.trainers.rllib.learner import Block
from rl_exit.trainers.rllib.module import EXIT_LOGITS, STATES, VALUES
from rl_exit.trainers.rllib.ppo import (
    explained_variance,
    fold_steps,
    ppo_loss,
    step_advantages,
    trajectory_weights,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("store") / "store")


def _algorithm(store: StateStore, **settings: Any) -> Any:
    values = {"reward": "vanilla", "alpha": 0.05, "width": 16, "batch_size": len(store.rows), "epochs": 1, **settings}
    algorithm = build_algorithm(store.path, PolicyPhaseSettings(**values))
    algorithm.load_policy(heads(store).state_dict())
    return algorithm


def _block(algorithm: Any, epsilon: float, epoch: int = 0) -> Block:
    drawn = algorithm.env_runner.sample(blocks=algorithm.plan.blocks(epoch, 0), epsilon=epsilon)[0][1]
    return algorithm.learner_group._learner._load(TrajectoryBatch(drawn, epsilon, len(drawn)))


def _gradient(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_folded_gradient_is_that_of_a_loop_over_steps(store: StateStore, epsilon: float) -> None:
    algorithm = _algorithm(store, trajectories=4)
    learner = algorithm.learner_group._learner
    policy = learner.exit_module.policy
    block = _block(algorithm, epsilon)
    folded = _gradient(learner.loss(policy(block.states), block), policy)

    total = torch.zeros(())
    count, number = block.reward.shape
    for i in range(count):
        for k in range(number):
            others = [float(block.reward[i, j]) for j in range(number) if j != k]
            advantage = float(block.reward[i, k]) - sum(others) / len(others)
            log_pi, log_behaviour = torch.zeros(()), 0.0
            for layer in range(1, min(int(block.exit_layer[i, k]), store.num_layers - 1) + 1):
                pi = policy.at(layer, block.states[i : i + 1, layer - 1]).sigmoid()[0]
                leaves = layer == int(block.exit_layer[i, k])
                acted = explore(pi.detach(), epsilon)
                log_pi = log_pi + (pi if leaves else 1 - pi).log()
                log_behaviour += float((acted if leaves else 1 - acted).log())
            ratio = float(log_pi.detach()) - log_behaviour
            total = total - np.exp(ratio) * advantage * log_pi
    naive = _gradient(total / (count * number), policy)
    torch.testing.assert_close(folded, naive, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(folded * 1.01, naive, rtol=1e-4, atol=1e-6)
    if epsilon:  # without its importance weights the gradient would be that of another policy
        unweighted = Block(
            TrajectoryBatch(block.batch.trajectories, 0.0, block.batch.total), *list(vars(block).values())[1:]
        )
        other = _gradient(learner.loss(policy(block.states), unweighted), policy)
        assert not torch.allclose(other, naive, rtol=1e-2, atol=1e-4)
    algorithm.stop()


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("mean", 3 / 4)])
def test_mean_sampled_gradient_is_the_exact_one(store: StateStore, baseline: str, factor: float) -> None:
    algorithm = _algorithm(store, trajectories=4, baseline=baseline)
    learner = algorithm.learner_group._learner
    policy = learner.exit_module.policy
    states = torch.from_numpy(store.states(store.rows))
    exact = _gradient(-expected_return(policy(states), reward_table(store, "vanilla", 0.05)).mean(), policy)
    rounds = 3000
    with torch.no_grad():
        pi = policy(states).sigmoid()
    table = reward_table(store, "vanilla", 0.05)
    drawn = sample_trajectories(
        pi.repeat(rounds, 1).numpy(),
        table.repeat(rounds, 1).numpy(),
        np.tile(store.rows.astype(np.int32), rounds),
        4,
        0.0,
        np.random.Generator(np.random.Philox(0)),
    )
    block = Block(
        TrajectoryBatch(drawn, 0.0, len(drawn)),
        states,
        torch.tensor(drawn.exit_layer, dtype=torch.int64),
        torch.tensor(drawn.reward),
        torch.tensor(drawn.log_prob),
    )
    sampled = _gradient(learner.loss(policy(states).repeat(rounds, 1), block), policy)
    cosine = float(torch.nn.functional.cosine_similarity(sampled, exact, 0))
    length = float(sampled @ exact / (exact @ exact))
    assert cosine > 0.999
    assert abs(length - factor) < 0.02
    algorithm.stop()


def _rows(block: Block, advantage: torch.Tensor, pi: torch.Tensor) -> dict[str, Any]:
    """The steps of a block one by one, as RLlib has them."""
    obs, layer, action, log_prob, gain, target = [], [], [], [], [], []
    last = pi.shape[1]
    for i, k in np.ndindex(*block.exit_layer.shape):
        for step in range(1, min(int(block.exit_layer[i, k]), last) + 1):
            leaves = step == int(block.exit_layer[i, k])
            obs.append(block.states[i, step - 1])
            layer.append(step)
            action.append(int(leaves))
            log_prob.append((pi[i, step - 1] if leaves else 1 - pi[i, step - 1]).log())
            gain.append(advantage[i, k, step - 1])
            target.append(block.reward[i, k])
    return {
        Columns.OBS: {"state": torch.stack(obs), "layer": torch.tensor(layer)},
        Columns.ACTIONS: torch.tensor(action),
        Columns.ACTION_LOGP: torch.stack(log_prob),
        Columns.ACTION_DIST_INPUTS: torch.zeros(len(obs), 2),
        Postprocessing.ADVANTAGES: torch.stack(gain),
        Postprocessing.VALUE_TARGETS: torch.stack(target),
    }


def _rllib_loss(module: Any, rows: dict[str, Any], entropy: float) -> torch.Tensor:
    config = PPOConfig().training(use_kl_loss=False, clip_param=0.2, vf_clip_param=float("inf"), vf_loss_coeff=0.5)
    stub = SimpleNamespace(
        module={"m": SimpleNamespace(unwrapped=lambda: module)},
        entropy_coeff_schedulers_per_module={"m": SimpleNamespace(get_current_value=lambda: entropy)},
        metrics=SimpleNamespace(log_dict=lambda *_, **__: None),
    )
    return PPOTorchLearner.compute_loss_for_module(
        stub, module_id="m", config=config, batch=rows, fwd_out=module._forward(rows)
    )


@pytest.mark.parametrize(("epsilon", "entropy"), [(0.0, 0.0), (0.2, 0.01)])
def test_ppo_equals_rllibs_own(store: StateStore, epsilon: float, entropy: float) -> None:
    algorithm = _algorithm(store, algorithm="ppo", trajectories=4)
    module = algorithm.learner_group._learner.exit_module
    block = _block(algorithm, epsilon)
    with torch.no_grad():
        out = module._forward({STATES: block.states})
        pi = explore(out[EXIT_LOGITS].sigmoid(), epsilon)
        advantage, taken = step_advantages(block.exit_layer, block.reward, out[VALUES])
        chosen = advantage[taken]
        assert abs(float(chosen.mean())) < 1e-5
        assert abs(float(chosen.std()) - 1) < 1e-5
        steps = fold_steps(block.exit_layer, block.reward, advantage, taken, pi)
        rows = _rows(block, advantage, pi)
        # Move the module, so that ratios differ from 1 and some are clipped.
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)

    def ours(clip: float = 0.2) -> torch.Tensor:
        now = module._forward({STATES: block.states})
        return ppo_loss(now[EXIT_LOGITS], now[VALUES], steps, clip=clip, value_coefficient=0.5, entropy=entropy)[0]

    theirs = _rllib_loss(module, rows, entropy)
    torch.testing.assert_close(ours(), theirs, rtol=1e-5, atol=1e-5)
    gradient = _gradient(theirs, module)
    torch.testing.assert_close(_gradient(ours(), module), gradient, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(0.1), theirs, rtol=1e-5, atol=1e-5)  # so clipping is at work
    assert not torch.allclose(_gradient(ours(0.1), module), gradient, rtol=1e-4, atol=1e-5)
    rows[Postprocessing.ADVANTAGES] = rows[Postprocessing.ADVANTAGES] * 1.01
    assert not torch.allclose(ours(), _rllib_loss(module, rows, entropy), rtol=1e-5, atol=1e-5)
    algorithm.stop()


def test_a_weight_counts_a_trajectory_so_often(store: StateStore) -> None:
    generator = torch.Generator().manual_seed(0)
    exits = torch.randint(1, 6, (20, 4), generator=generator)
    reward, values = torch.randn(20, 4, generator=generator), torch.randn(20, 4, generator=generator)
    pi = torch.rand(20, 4, generator=generator)
    times = torch.tensor([0, 1, 2, 3])
    advantage, taken = step_advantages(exits, reward, values)
    weighted = fold_steps(exits, reward, advantage, taken, pi, times.float().expand(20, 4))
    repeated = [part.repeat_interleave(times, 1) for part in (exits, reward, advantage, taken)]
    for name, value in vars(fold_steps(*repeated, pi)).items():
        torch.testing.assert_close(getattr(weighted, name), value)
    plain = fold_steps(exits, reward, advantage, taken, pi)
    assert not torch.allclose(weighted.target_sum, plain.target_sum)


@pytest.mark.parametrize("algorithm", ["pg", "ppo"])
def test_a_lag_is_weighted_away(store: StateStore, algorithm: str) -> None:
    """Trajectories of older weights give the gradient of the present ones, on average."""
    algo = _algorithm(store, algorithm=algorithm, trajectories=2)
    learner = algo.learner_group._learner
    module, rounds = learner.exit_module, 3000
    with torch.no_grad():
        old = module.policy(store.states(store.rows)).sigmoid().repeat(rounds, 1).numpy()
        generator = torch.Generator().manual_seed(1)
        for parameter in module.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        out = module._forward({STATES: torch.from_numpy(store.states(store.rows))})
    many = {name: value.repeat(rounds, 1) for name, value in out.items()}
    now = many[EXIT_LOGITS].sigmoid().numpy()
    table = reward_table(store, "vanilla", 0.05).repeat(rounds, 1).numpy()

    def gradient(pi: np.ndarray, lag: int) -> torch.Tensor:
        rows = np.tile(store.rows.astype(np.int32), rounds)
        drawn = sample_trajectories(pi, table, rows, 2, 0.0, np.random.Generator(np.random.Philox(lag)))
        block = Block(
            TrajectoryBatch(drawn, 0.0, len(drawn), lag),
            torch.empty(0),
            torch.tensor(drawn.exit_layer, dtype=torch.int64),
            torch.tensor(drawn.reward),
            torch.tensor(drawn.log_prob),
        )
        logits = many[EXIT_LOGITS].clone().requires_grad_()
        if algorithm == "pg":
            loss = learner.loss(logits, block)
        else:
            steps = learner.prepare(block, many)
            loss, _ = ppo_loss(logits, many[VALUES], steps, clip=0.2, value_coefficient=0.0, entropy=0.0)
        (found,) = torch.autograd.grad(loss, logits)
        return found.reshape(rounds, -1).sum(0)

    wanted, lagged, ignored = gradient(now, 0), gradient(old, 1), gradient(old, 0)

    def distance(other: torch.Tensor) -> float:
        return float((other - wanted).norm() / wanted.norm())

    assert distance(lagged) < 0.1, distance(lagged)
    assert distance(ignored) > 0.2, distance(ignored)
    algo.stop()


def test_explained_variance_is_that_of_the_single_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    exits = torch.randint(1, 6, (30, 4), generator=generator)
    reward, pi = torch.randn(30, 4, generator=generator), torch.full((30, 4), 0.5)
    values = 0.4 * reward.mean(1, keepdim=True) + 0.1 * torch.randn(30, 4, generator=generator)
    advantage, taken = step_advantages(exits, reward, values)
    steps = fold_steps(exits, reward, advantage, taken, pi)
    target, value = reward.unsqueeze(-1).expand_as(advantage)[taken], values.unsqueeze(1).expand_as(advantage)[taken]
    expected = 1 - (target - value).var(correction=0) / target.var(correction=0)
    torch.testing.assert_close(explained_variance(steps, values), expected, rtol=1e-4, atol=1e-5)
    assert float(explained_variance(steps, torch.zeros_like(values))) == pytest.approx(0.0, abs=1e-5)


def test_trajectory_weights_by_hand() -> None:
    pi, drew = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.25, 0.4]])
    exits = torch.tensor([[1, 2, 3]])
    log_prob = exit_distribution(drew).log()
    torch.testing.assert_close(
        trajectory_weights(pi, exits, log_prob), torch.tensor([[0.5 / 0.25, 0.5 * 0.2 / (0.75 * 0.4), 0.4 / 0.45]])
    )


def test_module_acts_alike_on_blocks_and_on_steps(store: StateStore) -> None:
    algorithm = _algorithm(store, algorithm="ppo")
    module = algorithm.learner_group._learner.exit_module
    rows = np.arange(7)
    states = torch.from_numpy(store.states(rows))
    layers = torch.tensor([1, 4, 2, 5, 3, 1, 4])
    obs = {"state": states[torch.arange(7), layers - 1], "layer": layers}
    whole = module._forward({STATES: states})
    logits = module._forward({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
    pi = logits.softmax(-1)[:, 1]
    for i, layer in enumerate(layers.tolist()):
        expected = whole[EXIT_LOGITS][i, layer - 1].sigmoid() if layer < 5 else torch.tensor(0.5)
        torch.testing.assert_close(pi[i], expected, rtol=1e-5, atol=1e-6)
        if layer < 5:
            torch.testing.assert_close(module.compute_values({Columns.OBS: obs})[i], whole[VALUES][i, layer - 1])
    module.epsilon.fill_(0.4)
    explored = module.forward_exploration({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS].softmax(-1)[:, 1]
    torch.testing.assert_close(explored, explore(pi, 0.4))
    module.epsilon.fill_(0.0)
    algorithm.stop()


def test_entropy_bonus_spreads_the_actions(store: StateStore) -> None:
    algorithm = _algorithm(store, trajectories=4, entropy=100.0, lr=1e-2, batch_size=32, epochs=40)
    while not algorithm.finished:
        algorithm.train()
    policy = algorithm.learner_group._learner.exit_module.policy
    with torch.no_grad():
        pi = policy(store.states(store.rows)).sigmoid()
    # The bonus counts entropies at layers as often as they are reached; a bonus this large drowns the return.
    assert float((pi - 0.5).abs().mean()) < 0.1
    assert exit_distribution(pi).shape == (96, 5)
    algorithm.stop()
