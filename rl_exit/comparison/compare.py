"""The whole comparison: every criterion on every set of exits of every group of runs, as one JSON tree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rl_exit.comparison.bootstrap import REPLICATES, resamples
from rl_exit.comparison.evidence import CONSISTENTEE, FINAL, ExitSet, Group, SeedRun, Split
from rl_exit.comparison.figures import WITHIN, MethodFigures, full_depth, measure_method
from rl_exit.comparison.pool import best_of, gain_tree, point_tree, pooled, pooled_curve, saved_at, value_tree
from rl_exit.comparison.tally import Doubles, Floats, measure_once
from rl_exit.evaluation import oracle_layers

Told = Callable[[int, int], None]  # methods done, methods in all


def compare(
    groups: Sequence[Group], metric: str, replicates: int = REPLICATES, seed: int = 0, told: Told | None = None
) -> dict[str, Any]:
    """Measure every method and hold it against the others.

    A method is a criterion on a set of exits of a group. It is called ``<criterion>`` on the finished model's exits of
    the first group; ``@initial`` is put behind it for the exits after initialisation, ``<group>/`` before it for the
    other groups. The reference of a seed is the full depth of the initialisation of the first group that has the
    seed: one bar for all methods.

    Args:
        groups: The first is the one that is held against the baselines.
        metric: ``accuracy``, ``f1`` or ``mcc``.
        replicates: R of the bootstrap.
        seed: Of the bootstrap.
        told: Told the methods that are done.

    Returns:
        ``full_depth_score``, ``oracle``, ``methods``, ``best_baseline``, ``difference``, ``gap_closed``, ``groups`` and
        what they rest on; see docs/compare.md.

    Raises:
        ValueError: No group, a name given twice, or runs of one seed that were measured on different instances.
    """
    names = [group.name for group in groups]
    if not names or len(set(names)) < len(names) or not all(group.runs for group in groups):
        raise ValueError(f"groups must have runs and names of their own, got {names}")
    work = _Comparison(groups, metric, _Resampling(replicates, seed))
    work.measure(told)
    return work.tree()


@dataclass(frozen=True)
class _Method:
    """Where a method belongs."""

    group: str
    exits: str
    criterion: str


@dataclass
class _Resampling:
    """Weights of the bootstrap, the same wherever the same instances are measured."""

    replicates: int
    seed: int
    known: dict[str, Floats] = field(default_factory=dict)

    def weights(self, split: Split, on_dev: bool = False) -> Floats:
        """[N, 1+R]."""
        key = f"{fingerprint(split)} {on_dev}"
        if key not in self.known:
            # Dev and test of equal size shall not be drawn alike.
            self.known[key] = resamples(split.num_instances, self.replicates, 2 * self.seed + on_dev)
        return self.known[key]


class _Comparison:
    """The figures of all methods, and the tree made of them."""

    def __init__(self, groups: Sequence[Group], metric: str, resampling: _Resampling) -> None:
        self.groups = groups
        self.metric = metric
        self.resampling = resampling
        self.main = groups[0]
        self.figures: dict[str, dict[int, MethodFigures]] = {}
        self.methods: dict[str, _Method] = {}
        self.references = self._references()

    def measure(self, told: Told | None) -> None:
        """Figures of every method by seed."""
        jobs = list(self._jobs())
        for done, (group, run, exits, word) in enumerate(jobs):
            key = self._key(group, exits.name, word)
            weights, reference, dev_reference = self._bar(run)
            dev = None
            if exits.dev is not None and dev_reference is not None:
                dev = (exits.dev, self.resampling.weights(exits.dev, True), dev_reference)
            self.methods.setdefault(key, _Method(group.name, exits.name, word))
            self.figures.setdefault(key, {})[run.seed] = measure_method(
                exits.scores[word], exits.split, weights, reference, self.metric, dev
            )
            if told is not None:
                told(done + 1, len(jobs))

    def tree(self) -> dict[str, Any]:
        """The JSON form."""
        run = self.main.runs[0]
        seeds = [run.seed for run in self.main.runs]
        references = [self.references[seed][0] for seed in seeds]
        ours = self._ours(self.main)
        best = self._best(seeds, self._is_baseline)
        return {
            "metric": self.metric,
            "num_instances": run.sets[FINAL].split.num_instances,
            "num_layers": run.sets[FINAL].split.num_layers,
            "seeds": seeds,
            "replicates": self.resampling.replicates,
            "full_depth_score": _score_tree(seeds, references),
            "oracle": self._oracle(self.main),
            "methods": {key: self._method(key) for key in self.figures},
            "ours": ours,
            "best_baseline": best,
            "difference": self._gains(ours, best, seeds),
            "gap_closed": self._gap(ours, best, seeds),
            "transferred": self._transferred(ours, seeds),
            "groups": [self._group(group) for group in self.groups],
        }

    def _jobs(self) -> Iterator[tuple[Group, SeedRun, ExitSet, str]]:
        for group in self.groups:
            for run in group.runs:
                for exits in run.sets.values():
                    for word in exits.scores:
                        yield group, run, exits, word

    def _key(self, group: Group, exits: str, word: str) -> str:
        before = "" if group is self.main else f"{group.name}/"
        return f"{before}{word}{'' if exits == FINAL else f'@{exits}'}"

    def _ours(self, group: Group) -> str | None:
        key = self._key(group, FINAL, CONSISTENTEE)
        return key if key in self.figures else None

    def _is_baseline(self, key: str) -> bool:
        return self.methods[key].criterion != CONSISTENTEE

    def _references(self) -> dict[int, tuple[Doubles, Doubles | None, str]]:
        """Seed -> (full depth on the split, on dev, fingerprint of the instances)."""
        found: dict[int, tuple[Doubles, Doubles | None, str]] = {}
        for group in self.groups:
            for run in group.runs:
                exits = run.reference
                mark = fingerprint(exits.split)
                if run.seed in found:
                    if found[run.seed][2] != mark:
                        raise ValueError(f"{run.run}: measured on other instances than the other runs of its seed")
                    continue
                weights = self.resampling.weights(exits.split)
                dev = exits.dev
                on_dev = None if dev is None else full_depth(dev, self.resampling.weights(dev, True), self.metric)
                found[run.seed] = (full_depth(exits.split, weights, self.metric), on_dev, mark)
        return found

    def _bar(self, run: SeedRun) -> tuple[Floats, Doubles, Doubles | None]:
        reference, on_dev, _ = self.references[run.seed]
        return self.resampling.weights(run.sets[FINAL].split), reference, on_dev

    def _method(self, key: str) -> dict[str, Any]:
        method, figures = self.methods[key], self.figures[key]
        group = next(group for group in self.groups if group.name == method.group)
        layers = group.runs[0].sets[FINAL].split.num_layers
        bound = pooled([self._bound(run, method.exits)[1] for run in group.runs if run.seed in figures])
        points = {name: {seed: one.points[name] for seed, one in figures.items()} for name in WITHIN}
        moved = all(one.transferred for one in figures.values())
        area = pooled([one.area for one in figures.values()])
        return {
            "criterion": method.criterion,
            "group": method.group,
            "exits": method.exits,
            "ours": key == self._ours(group),
            "seeds": list(figures),
            **{name: point_tree(points[name], layers) for name in WITHIN},
            "area": float(area[0]),
            "area_interval": value_tree(area)["interval"],
            "area_by_seed": [float(one.area[0]) for one in figures.values()],
            "distance_to_oracle": {
                name: float(bound[0] - saved_at(figures, name, list(figures))[0]) for name in WITHIN
            },
            "curve": pooled_curve([one.curve for one in figures.values()]),
            "transferred": {
                name: point_tree({seed: one.transferred[name] for seed, one in figures.items()}, layers)
                for name in WITHIN
            }
            if moved
            else None,
        }

    def _bound(self, run: SeedRun, exits: str) -> tuple[Doubles, Doubles]:
        """Score and saved layers of the oracle that leaves at the first correct exit, [1+R] each."""
        split = run.sets[exits].split
        ideal = oracle_layers(split.predictions == split.labels[:, None])
        return measure_once(split, ideal, self.resampling.weights(split), self.metric)

    def _oracle(self, group: Group, exits: str = FINAL) -> dict[str, Any]:
        bounds = {run.seed: self._bound(run, exits) for run in group.runs if exits in run.sets}
        layers = group.runs[0].sets[FINAL].split.num_layers
        score, saved = (pooled([bound[part] for bound in bounds.values()])[0] for part in (0, 1))
        return {
            "score": float(score),
            "mean_exit_layer": float(layers * (1.0 - saved)),
            "saved_layers": float(saved),
            "by_seed": [
                {"seed": seed, "score": float(bound[0][0]), "saved_layers": float(bound[1][0])}
                for seed, bound in bounds.items()
            ],
        }

    def _best(self, seeds: Sequence[int], allowed: Callable[[str], bool]) -> dict[str, str | None]:
        return {name: best_of(self.figures, name, seeds, allowed) for name in WITHIN}

    def _gains(self, ours: str | None, others: Mapping[str, str | None], seeds: Sequence[int]) -> dict[str, Any] | None:
        """Paired differences of saved layers, ours minus the other, by operating point."""
        if ours is None or None in others.values():
            return None
        tree: dict[str, Any] = {}
        for name, other in others.items():
            assert other is not None  # checked above
            mine, theirs = self.figures[ours], self.figures[other]
            tree[name] = {
                "baseline": other,
                **gain_tree(saved_at(mine, name, seeds), saved_at(theirs, name, seeds)),
                "by_seed": [float(mine[s].points[name].saved[0] - theirs[s].points[name].saved[0]) for s in seeds],
            }
        return tree

    def _gap(self, ours: str | None, best: Mapping[str, str | None], seeds: Sequence[int]) -> dict[str, Any] | None:
        """Share of the way from the best baseline to the oracle (on our exits) that ours has gone."""
        if ours is None or None in best.values():
            return None
        bound = pooled([self._bound(run, FINAL)[1] for run in self.main.runs])[0]
        tree: dict[str, float | None] = {}
        for name, key in best.items():
            assert key is not None  # checked above
            mine, theirs = (float(saved_at(self.figures[k], name, seeds)[0]) for k in (ours, key))
            tree[name] = (mine - theirs) / float(bound - theirs) if bound > theirs else None
        return tree

    def _transferred(self, ours: str | None, seeds: Sequence[int]) -> dict[str, Any] | None:
        """Both choices made on dev, the threshold and the best baseline; what they bring on the split measured."""
        tree: dict[str, Any] = {}
        for name in WITHIN:
            on_dev = {
                key: float(np.mean([figures[s].on_dev[name].saved[0] for s in seeds]))
                for key, figures in self.figures.items()
                if self._is_baseline(key) and all(s in figures and figures[s].on_dev for s in seeds)
            }
            if ours is None or not on_dev or not self.figures[ours][seeds[0]].transferred:
                return None
            best = max(on_dev, key=lambda key: on_dev[key])
            pair = [[self.figures[key][s].transferred[name] for s in seeds] for key in (ours, best)]
            saved, scores = ([pooled([getattr(p, a) for p in one]) for one in pair] for a in ("saved", "score"))
            score_gain = value_tree(scores[0] - scores[1])
            tree[name] = {
                "baseline": best,
                **gain_tree(saved[0], saved[1]),
                "score": score_gain["value"],
                "score_interval": score_gain["interval"],
            }
        return tree

    def _group(self, group: Group) -> dict[str, Any]:
        seeds = [run.seed for run in group.runs]
        ours, main = self._ours(group), self._ours(self.main)
        best = self._best(seeds, lambda key: self._is_baseline(key) and self.methods[key].group == group.name)
        shared = [seed for seed in seeds if any(run.seed == seed for run in self.main.runs)]
        against = None
        if group is not self.main and main is not None and shared:
            against = self._gains(ours, dict.fromkeys(WITHIN, main), shared)
        return {
            "name": group.name,
            "main": group is self.main,
            "settings": dict(group.settings),
            "seeds": seeds,
            "runs": [run.run for run in group.runs],
            "full_depth_score": {
                name: _score_tree(seeds, list(map(partial(self._depth, name=name), group.runs)))
                for name in group.runs[0].sets
                if all(name in run.sets for run in group.runs)
            },
            "oracle": self._oracle(group),
            "consistentee": ours,
            "by_confidence": [run.seed for run in group.runs if run.policy_rule == "confidence"],
            "best_baseline": best,
            "difference": self._gains(ours, best, seeds),
            "against_first": against,
        }

    def _depth(self, run: SeedRun, name: str) -> Doubles:
        split = run.sets[name].split
        return full_depth(split, self.resampling.weights(split), self.metric)


def fingerprint(split: Split) -> str:
    """Equal for equal ids and labels."""
    digest = hashlib.sha256(np.ascontiguousarray(split.ids).tobytes())
    digest.update(np.ascontiguousarray(split.labels).tobytes())
    return digest.hexdigest()[:16]


def _score_tree(seeds: Sequence[int], scores: Sequence[Doubles]) -> dict[str, Any]:
    each = [{"seed": seed, "score": float(score[0])} for seed, score in zip(seeds, scores, strict=True)]
    whole = value_tree(pooled(scores))
    return {"pooled": whole["value"], "interval": whole["interval"], "by_seed": each}
