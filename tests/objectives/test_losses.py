"""Every loss on a small example, against its closed form written out with loops."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from rl_exit.config import Objective as WORDS
from rl_exit.errors import ConfigError
from rl_exit.method import exit_distribution
from rl_exit.objectives import (
    OBJECTIVES,
    Loss,
    Objective,
    ObjectiveOptions,
    PolicyWeights,
    Shape,
    exit_losses,
    objective,
    task_step,
)
from rl_exit.objectives.losses import distilled_losses

SHAPE = Shape(num_layers=3, hidden_size=2, num_classes=4)


def example(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 3, 2, generator=generator),
        torch.randn(count, 3, 4, generator=generator),
        torch.tensor([0, 3, 1, 2, 2])[:count],
    )


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def entropies(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """CE[i][l] with plain loops."""
    return [
        [-math.log(softmax(row)[label]) for row in rows]
        for rows, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_exit_losses_equal_a_loop() -> None:
    _, logits, labels = example()
    slow = torch.tensor(entropies(logits, labels))
    assert torch.allclose(exit_losses(logits, labels), slow, atol=1e-6)
    assert not torch.allclose(exit_losses(logits, (labels + 1) % 4), slow, atol=1e-2)


def test_weighted_and_uniform_by_hand() -> None:
    states, logits, labels = example()
    ce = entropies(logits, labels)
    # Eq. 2 with L = 3: (1 a + 2 b + 3 c) / 6.
    weighted = mean([(a + 2 * b + 3 * c) / 6 for a, b, c in ce])
    assert float(objective("weighted", SHAPE, 1).phases[0].loss(states, logits, labels, 0)) == pytest.approx(weighted)
    uniform = float(objective("uniform", SHAPE, 1).phases[0].loss(states, logits, labels, 0))
    assert uniform == pytest.approx(mean([sum(row) for row in ce])) and abs(uniform - weighted) > 0.1


def slow_distilled(logits: Tensor, labels: Tensor, d: float, t: float) -> Tensor:
    ce = entropies(logits, labels)
    rows = []
    for i, exits in enumerate(logits.tolist()):
        teacher = softmax(exits[-1], t)
        mixed = [(1 - d) * ce[i][j] + d * t * t * kl(teacher, softmax(exits[j], t)) for j in range(2)]
        rows.append([*mixed, ce[i][2]])
    return torch.tensor(rows)


@pytest.mark.parametrize(("d", "t"), [(0.0, 2.0), (0.3, 1.0), (0.7, 2.5), (1.0, 4.0)])
def test_distillation_by_hand(d: float, t: float) -> None:
    states, logits, labels = example()
    slow = slow_distilled(logits, labels, d, t)
    assert torch.allclose(distilled_losses(logits, labels, d, t), slow, atol=1e-5)
    if d:
        assert not torch.allclose(distilled_losses(logits, labels, d, t * 1.5), slow, atol=1e-2)
    loss = objective("distilled", SHAPE, 1, ObjectiveOptions(distillation=d, temperature=t)).phases[0].loss
    assert float(loss(states, logits, labels, 0).detach()) == pytest.approx(
        float((slow * torch.tensor([1, 2, 3]) / 6).sum(1).mean()), abs=1e-5
    )


def test_the_teacher_learns_nothing_from_its_pupils() -> None:
    _, logits, labels = example()
    logits.requires_grad_(True)
    distilled_losses(logits, labels, 1.0, 2.0)[:, :-1].sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, -1] == 0).all()) and bool((logits.grad[:, :-1] != 0).any())


@pytest.mark.parametrize(("d", "t", "anchor"), [(0.0, 1.0, 0.0), (0.4, 2.0, 0.0), (0.4, 2.0, 0.8), (0.0, 1.0, 0.5)])
def test_task_step_by_hand(d: float, t: float, anchor: float) -> None:
    states, logits, labels = example()
    exit_logits = torch.tensor([[0.3, -0.8]])
    chosen = task_step(
        lambda h, z: exit_logits.expand(len(h), 2), "expected", 1, ObjectiveOptions(None, d, t, anchor)
    ).phases[0]
    pi = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(0.8))]
    weights = [pi[0], (1 - pi[0]) * pi[1], (1 - pi[0]) * (1 - pi[1])]
    slow = slow_distilled(logits, labels, d, t).tolist()
    expected = mean([sum(w * x for w, x in zip(weights, row, strict=True)) for row in slow])
    expected += anchor * mean([row[-1] for row in entropies(logits, labels)])
    assert float(chosen.loss(states, logits, labels, 0)) == pytest.approx(expected, abs=1e-5)


def test_drawn_exits_follow_the_policy() -> None:
    exit_logits = torch.tensor([[0.3, -0.8]])
    policy = lambda states, logits: exit_logits.expand(len(states), 2)  # noqa: E731
    states = torch.zeros(20000, 3, 2)
    torch.manual_seed(0)
    drawn = PolicyWeights(policy, "sample")(states, states)
    expected = exit_distribution(exit_logits.sigmoid())[0]
    assert torch.equal(drawn.sum(1), torch.ones(20000)) and set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), expected, atol=0.015)
    assert not torch.allclose(drawn.mean(0), expected.flip(0), atol=0.015)
    assert torch.allclose(PolicyWeights(policy, "expected")(states[:1], states[:1])[0], expected)


def loss_of(word: str, phase: str, options: ObjectiveOptions | None = None) -> tuple[Loss, Objective]:
    torch.manual_seed(0)
    chosen = objective(word, SHAPE, 1, options)
    return next(one.loss for one in chosen.phases if one.name == phase), chosen


@pytest.mark.parametrize("word", ["two_stage", "self_distillation", "cat", "jei"])
def test_fine_tuning_is_the_last_exit_alone(word: str) -> None:
    states, logits, labels = example()
    expected = mean([row[-1] for row in entropies(logits, labels)])
    assert float(loss_of(word, "fine_tune")[0](states, logits, labels, 0)) == pytest.approx(expected)


@pytest.mark.parametrize("word", ["two_stage", "jei"])
def test_early_exits_by_hand(word: str) -> None:
    states, logits, labels = example()
    expected = mean([a + b for a, b, _ in entropies(logits, labels)])
    assert float(loss_of(word, "exits")[0](states, logits, labels, 0)) == pytest.approx(expected)


def test_self_distillation_by_hand() -> None:
    states, logits, labels = example()
    exits = [[softmax(row) for row in rows] for rows in logits.tolist()]
    expected = mean([kl(a, last) + kl(b, last) for a, b, last in exits])
    loss, _ = loss_of("self_distillation", "distill")
    assert float(loss(states, logits, labels, 0).detach()) == pytest.approx(expected, abs=1e-6)
    assert float(loss(states, logits, (labels + 1) % 4, 0)) == pytest.approx(expected, abs=1e-6)
    # The other direction of KL is another loss.
    assert abs(mean([kl(last, a) + kl(last, b) for a, b, last in exits]) - expected) > 1e-2


def test_alternation_of_berxit_by_hand() -> None:
    states, logits, labels = example()
    loss, chosen = loss_of("alternate", "alternate")
    ce = entropies(logits, labels)
    odd = mean([row[-1] for row in ce])
    assert (
        float(loss(states, logits, labels, 0).detach())
        == float(loss(states, logits, labels, 2).detach())
        == pytest.approx(odd)
    )
    weight = chosen.heads["lte"].state_dict()["linear.weight"][0].tolist()
    bias = float(chosen.heads["lte"].state_dict()["linear.bias"])
    even = 0.0
    for i, label in enumerate(labels.tolist()):
        even += sum(ce[i])
        for j in range(2):
            z = sum(w * h for w, h in zip(weight, states[i, j].tolist(), strict=True)) + bias
            right = logits[i, j].tolist().index(max(logits[i, j].tolist())) == label
            even += (1 / (1 + math.exp(-z)) - right) ** 2
    assert float(loss(states, logits, labels, 1).detach()) == pytest.approx(even / 5, abs=1e-5)
    with torch.no_grad():
        chosen.heads["lte"].get_parameter("linear.bias").add_(1.0)
    assert float(loss(states, logits, labels, 1).detach()) != pytest.approx(even / 5, abs=1e-3)


def test_exits_of_cat_learn_the_last_layers_answer() -> None:
    states, logits, labels = example()
    answers = [row[-1].index(max(row[-1])) for row in logits.tolist()]
    assert answers != labels.tolist()
    ce = entropies(logits, torch.tensor(answers))
    loss, _ = loss_of("cat", "exits")
    assert float(loss(states, logits, labels, 0).detach()) == pytest.approx(mean([(a + b) / 2 for a, b, _ in ce]))


def test_the_meta_loss_of_cat_by_hand() -> None:
    # Answers of exits 1, 2, 3. Exit 1: instances 0 and 2 agree with exit 3, 1 differs; exit 2: all agree.
    first = [[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]
    logits = torch.tensor([first, [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]], first])
    states, labels = torch.randn(3, 3, 2), torch.tensor([0, 1, 1])
    torch.manual_seed(0)
    chosen = objective("cat", Shape(3, 2, 2), 1)
    odds = chosen.heads["cat"](states, logits).tolist()
    agree, differ = (lambda z: math.log(1 + math.exp(-z))), (lambda z: math.log(1 + math.exp(z)))
    at_1 = (agree(odds[0][0]) + agree(odds[2][0])) / 4 + differ(odds[1][0]) / 2
    at_2 = mean([agree(row[1]) for row in odds])
    assert float(chosen.phases[2].loss(states, logits, labels, 0).detach()) == pytest.approx((at_1 + at_2) / 2)


@pytest.mark.parametrize(("beta", "prior"), [(0.0, 0.1), (0.5, 0.1), (2.0, 0.4)])
def test_pondernet_by_hand(beta: float, prior: float) -> None:
    states, logits, labels = example()
    loss, chosen = loss_of("pondernet", "pondernet", ObjectiveOptions(ponder_weight=beta, ponder_prior=prior))
    with torch.no_grad():
        chosen.heads["palbert"].get_parameter("out.bias").fill_(1.0)  # away from the prior, at which heads start
        odds = chosen.heads["palbert"](states, logits).tolist()
    geometric = [prior, (1 - prior) * prior, (1 - prior) ** 2]
    total = 0.0
    for ce, (a, b) in zip(entropies(logits, labels), odds, strict=True):
        first, second = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        leave = [first, (1 - first) * second, (1 - first) * (1 - second)]
        total += sum(p * x for p, x in zip(leave, ce, strict=True)) + beta * kl(geometric, leave)
        if beta:
            assert kl(geometric, leave) != pytest.approx(kl(leave, geometric), abs=1e-4)
    assert float(loss(states, logits, labels, 0).detach()) == pytest.approx(total / 5, abs=1e-5)


def test_the_joint_phase_of_jei_by_hand() -> None:
    states, logits, labels = example()
    loss, chosen = loss_of("jei", "joint", ObjectiveOptions(gate_price=0.6))
    logits.requires_grad_(True)
    odds = chosen.heads["jei"](states, logits)
    expected = 0.0
    for ce, (a, b) in zip(entropies(logits.detach(), labels), odds.tolist(), strict=True):
        first, second = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        leave = [first, (1 - first) * second, (1 - first) * (1 - second)]
        cheapest = min(range(3), key=lambda j: ce[j] + 0.2 * (j + 1))
        target = [float(cheapest <= 0), float(cheapest <= 1)]
        gate = [-math.log(p if t else 1 - p) for p, t in zip((first, second), target, strict=True)]
        expected += sum(p * x for p, x in zip(leave, ce, strict=True)) + mean(gate)
    value = loss(states, logits, labels, 0)
    assert float(value.detach()) == pytest.approx(expected / 5, abs=1e-5)
    # The exits learn as if the gates were given: their gradient is P(l) times that of CE_l.
    value.backward()
    sent = exit_distribution(odds.detach().sigmoid())[..., None]
    assert logits.grad is not None
    slow = sent * (logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 4)[:, None]) / 5
    assert torch.allclose(logits.grad, slow, atol=1e-6)


def test_phases_follow_their_sources() -> None:
    def plan(word: str, options: ObjectiveOptions | None = None) -> list[tuple[str, int, bool, str, bool]]:
        phases = objective(word, SHAPE, 3, options).phases
        return [(one.name, one.epochs, one.backbone, one.exits, one.heads) for one in phases]

    start = ("fine_tune", 3, True, "last", False)
    assert plan("two_stage") == [start, ("exits", 3, False, "early", False)]
    assert plan("self_distillation") == [start, ("distill", 5, False, "early", False)]
    assert plan("cat") == [start, ("exits", 3, False, "early", False), ("meta", 3, False, "none", True)]
    assert plan("jei") == [start, ("exits", 3, False, "early", False), ("joint", 3, False, "early", True)]
    assert plan("alternate") == [("alternate", 3, True, "all", True)]
    assert plan("pondernet") == [("pondernet", 3, True, "all", True)]
    assert plan("self_distillation", ObjectiveOptions(second_epochs=2))[1][1] == 2


def test_the_configuration_knows_every_word() -> None:
    assert get_args(WORDS) == tuple(OBJECTIVES)


def test_an_unknown_word_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"init\.objective = 'weighed' is unknown; accepted: .*Did you mean 'wei"):
        objective("weighed", SHAPE, 1)
