from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor
from torch.nn import functional as F

from rl_exit.envs import CONTINUE, EXIT, EarlyExitEnv, LiveSource, Outcome, StateBlock, StateStore, check_early_exit_env


class Stack:
    """A stand-in for a model: ``h_l = tanh(W_l h_{l-1})``, counting the layers that run."""

    num_layers, hidden_size, classes = 4, 6, 3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.randn(self.num_layers, self.hidden_size, self.hidden_size, generator=generator)
        self.heads = torch.randn(self.num_layers, self.hidden_size, self.classes, generator=generator)
        self.ran: list[int] = []

    def begin(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["inputs"]

    def step(self, layer: int, carry: Tensor) -> Tensor:
        self.ran.append(layer)
        return torch.tanh(carry @ self.layers[layer - 1])

    def state(self, layer: int, carry: Tensor) -> Tensor:
        return carry

    def logits(self, layer: int, state: Tensor) -> Tensor:
        return state @ self.heads[layer - 1]


class Inputs:
    def __init__(self, count: int = 12) -> None:
        self.ids = np.arange(count) * 3
        self.labels = np.arange(count) % 3
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))

    def batch(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        return {"inputs": self.inputs[list(rows)]}


def block_of(model: Any, instances: Inputs) -> StateBlock:
    """All layers of all instances in one batch: what the store would hold."""
    carry = model.begin(instances.batch(range(len(instances.ids))))
    states, logits = [], []
    for layer in range(1, model.num_layers + 1):
        carry = model.step(layer, carry)
        states.append(model.state(layer, carry))
        logits.append(model.logits(layer, states[-1]))
    return to_block(instances, torch.stack(states, 1), torch.stack(logits, 1))


def to_block(instances: Any, states: Tensor, logits: Tensor) -> StateBlock:
    labels = torch.as_tensor(np.asarray(instances.labels))
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")
    correct = logits.argmax(-1) == labels[:, None]
    return StateBlock(
        instances.ids, labels.numpy(), losses.numpy(), correct.numpy(), logits.numpy(), states.float().numpy()
    )


@pytest.fixture
def stack_store(make_store) -> StateStore:
    return make_store(block_of(Stack(), Inputs()))


def test_the_live_episode_is_the_stored_episode(stack_store: StateStore) -> None:
    live = EarlyExitEnv(LiveSource(Stack(), Inputs(), stack_store.memorized()), alpha=0.1)
    stored = EarlyExitEnv(stack_store, alpha=0.1)
    for row in range(12):
        for exit_layer in range(1, 5):
            steps = []
            for env in (live, stored):
                observation, info = env.reset(options={"instance": row})
                taken = [(observation["state"], 0.0, info)]
                ended = False
                while not ended:
                    action = EXIT if observation["layer"] == exit_layer else CONTINUE
                    observation, reward, ended, _, info = env.step(action)
                    taken.append((observation["state"], reward, info))
                steps.append(taken)
            for (state, reward, info), (state_2, reward_2, info_2) in zip(*steps, strict=True):
                assert np.allclose(state, state_2, atol=1e-6)
                assert reward == pytest.approx(reward_2, abs=1e-6)
                assert info == pytest.approx(info_2, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*A Box observation space.*", "ignore:.*alternative render modes.*")
def test_the_live_environment_passes_both_checkers(stack_store: StateStore) -> None:
    env = EarlyExitEnv(LiveSource(Stack(), Inputs(), stack_store.memorized()))
    check_env(env)
    check_early_exit_env(env, stack_store)


def test_the_checker_sees_a_store_of_another_model(stack_store: StateStore) -> None:
    other = Stack()
    other.layers[2] *= 1.01
    with pytest.raises(AssertionError, match="state at layer 3 is not the instance's state"):
        check_early_exit_env(EarlyExitEnv(LiveSource(other, Inputs(), stack_store.memorized())), stack_store)


@pytest.mark.parametrize(("exit_layer", "ran"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4])])
def test_only_the_layers_up_to_the_exit_run(exit_layer: int, ran: list[int]) -> None:
    model = Stack()
    env = EarlyExitEnv(LiveSource(model, Inputs()), "vanilla")
    env.reset(options={"instance": 5})
    for _ in range(exit_layer - 1):
        env.step(CONTINUE)
    if exit_layer < 4:
        env.step(EXIT)
    assert model.ran == ran


def test_a_reward_that_is_no_sum_over_layers() -> None:
    outcomes: list[Outcome] = []

    def reward(outcome: Outcome) -> float:
        outcomes.append(outcome)
        return outcome.correct - outcome.seconds

    env = EarlyExitEnv(LiveSource(Stack(), Inputs()), reward)
    env.reset(options={"instance": 5})
    env.step(CONTINUE)
    _, gain, ended, _, info = env.step(EXIT)
    (outcome,) = outcomes
    assert ended and 0 < outcome.seconds < 5 and gain == outcome.correct - outcome.seconds
    assert (outcome.instance, outcome.id, outcome.label, outcome.exit_layer) == (5, 15, 2, 2)
    assert outcome.logits.shape == (3,) and outcome.memorized is None and "memorized" not in info


def test_what_the_live_source_refuses() -> None:
    with pytest.raises(ValueError, match=r"needs memorized layers: LiveSource\(..., memorized=...\)"):
        EarlyExitEnv(LiveSource(Stack(), Inputs()), "hardness")
    for memorized in (np.ones(11), np.zeros(12), np.full(12, 5)):
        with pytest.raises(ValueError, match=r"memorized must be \[12\] within 1..4"):
            LiveSource(Stack(), Inputs(), memorized)
    with pytest.raises(ValueError, match="object cannot be run layer by layer: it has no begin, step, state, logits"):
        LiveSource(object(), Inputs())
    with pytest.raises(ValueError, match="training mode"):
        LiveSource(torch.nn.Linear(2, 2), Inputs())
    source = LiveSource(Stack(), Inputs())
    with pytest.raises(ValueError, match=r"row 12; accepted: 0..11"):
        source.begin(12)
    for early in (source.step, source.outcome):
        with pytest.raises(ValueError, match="comes first"):
            early()


def test_a_real_model_steps_as_its_store_says(tiny_backbone: Path, make_store) -> None:
    from rl_exit.data.instances import Instances
    from rl_exit.models.early_exit import EarlyExitModel

    model = EarlyExitModel.from_backbone(str(tiny_backbone), ["a", "b"], policy_width=4).eval()
    lengths = [3, 5, 4, 6]
    instances = Instances(
        ids=np.arange(4) + 10,
        labels=np.array([0, 1, 1, 0]),
        tokens=np.random.default_rng(0).integers(4, 20, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        pad_token_id=0,
    )
    with torch.inference_mode():
        every = model.all_exits(**instances.batch(range(4)))
    store = make_store(to_block(instances, every.states, every.logits))
    env = EarlyExitEnv(LiveSource(model, instances, store.memorized()), alpha=0.1)
    check_early_exit_env(env, store)
