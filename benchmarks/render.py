"""Rewrite the tables in README.md and docs/ that stand between ``<!-- results: NAME -->`` and ``<!-- end -->``.

Run it after recording results: ``python benchmarks/render.py`` (``--check`` only compares; exit code 1: they differ).
Every table comes from a file of benchmarks/results; a test compares the pages with the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rl_exit.comparison.tables import (
    GROUP_HEADER,
    METHOD_HEADER,
    POINTS,
    Row,
    gain_text,
    group_rows,
    method_name,
    method_rows,
    span,
    verdicts,
)
from rl_exit.listings import GENERATION_HEADER, bench_rows, generation_rows
from rl_exit.trainers.bench.learning_report import learning_rows, learning_svg
from rl_exit.trainers.bench.writing_report import curve_rows, proven_rows, written_rows

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def sampling(results: dict[str, Any]) -> str:
    """The table of docs/performance.md, with its origin."""
    header, rows = bench_rows(results)
    machine, versions = results["machine"], results["versions"]
    shown = [[*cells, {True: "yes", False: "no", None: ""}[met]] for cells, met in rows]
    origin = (
        f"`{results['command']}` of {results['date'][:10]}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, one thread per process; Python {versions['python']}, torch "
        f"{versions['torch']}, Ray {versions['ray']}; {results['seconds']:.0f} s, load average at the end "
        f"{machine['load_average_at_end']:.1f}.\n"
    )
    return f"{origin}\n{markdown_table([*header, 'met'], shown)}"


def default(results: dict[str, Any]) -> str:
    """The table of the run that ``make run`` makes."""
    run = results["docstrings"]
    return f"{markdown_table(RUN_HEADER, _run_rows(run))}\n{_origin(run)}\n"


def tasks(results: dict[str, Any]) -> str:
    """The table of all recorded runs; the test split where it is labelled."""
    rows = [[name, *cells] for name, run in sorted(results.items()) for cells in _run_rows(run)]
    origins = "".join(f"- {_origin(run)}\n" for _, run in sorted(results.items()))
    return f"{markdown_table(['task', *RUN_HEADER], rows)}\n{origins}"


RUN_HEADER = ["split", "full depth %", "with exits %", "mean exit layer", "saved layers", "oracle %", "speed-up"]


def _run_rows(run: dict[str, Any]) -> list[list[str]]:
    found = run["results"]
    return [
        [
            split,
            f"{100 * row['full_depth_score']:.2f}",
            f"{100 * row['score']:.2f}",
            f"{row['mean_exit_layer']:.2f} of {found['num_layers']}",
            f"{100 * row['saved_layers']:.1f} %",
            f"{100 * row['oracle_score']:.2f}",
            f"{found['timing'][split]['speedup']:.2f}",
        ]
        for split in ("dev", "test")
        if (row := found[split]) is not None
    ]


def _origin(run: dict[str, Any]) -> str:
    versions = run["results"]["versions"]
    return (
        f"`{run['command']}`, {run['date']}, seed {run['results']['seed']}, {run['machine']['cores']} cores, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, Ray {versions['ray']}."
    )


def learning(results: dict[str, Any]) -> str:
    """The table of docs/algorithms.md, with its origin."""
    header, rows = learning_rows(results)
    machine, versions, best = results["machine"], results["versions"], results["optimum"]
    origin = (
        f"`{results['command']}` of {results['date'][:10]}, {results['store']['num_instances']} instances, reward "
        f"{results['reward']}, alpha {results['alpha']:g}: {machine['cpu']}, one thread; "
        f"torch {versions['torch']}, Ray {versions['ray']}. Return of the uniform policy "
        f"{results['uniform']:.4f}, of the "
        f"optimum J* {best['return']:.4f}; the best exit of every single instance would give {results['oracle']:.4f}.\n"
    )
    return f"{origin}\n{markdown_table(header, rows)}"


SUMMARY_HEADER = [
    *("task", "split", "full depth %", "point", "ConsistentEE: saved layers %", "interval", "best baseline"),
    *("saved layers %", "difference, points", "oracle saves %", "gap closed"),
]


def comparisons(results: dict[str, dict[str, Any]]) -> str:
    """The page of the comparisons: one line per task and operating point, then every task with all its methods."""
    if not results:
        return "Nothing is recorded yet.\n"
    trees = list(results.values())
    summary = markdown_table(SUMMARY_HEADER, [cells for tree in trees for cells in _summary(tree)])
    return summary + "".join(f"\n## {tree['task']}\n\n{_comparison(tree)}" for tree in trees)


def ablations(results: dict[str, dict[str, Any]]) -> str:
    """What each change of the recipe brings, from benchmarks/ablate.py."""
    if not results:
        return "Nothing is recorded yet.\n"
    header = ["policy", "no loss: saved layers %", "against evidence", "within 1: saved layers %", "against evidence"]
    parts = []
    for tree in results.values():
        rows = []
        for name, variant in tree["variants"].items():
            cells = [name]
            for point in POINTS:
                found = variant[point]
                same = name == "evidence"
                cells += [f"{100 * found['saved_layers']:.1f}", "" if same else gain_text(found["against_default"])]
            rows.append(cells)
        parts.append(
            f"**{tree['task']}**, {tree['split']}, seeds {', '.join(map(str, tree['seeds']))} pooled "
            f"(`{tree['command']}`, {tree['date'][:10]}, torch {tree['versions']['torch']}).\n\n"
            f"{markdown_table(header, rows)}"
        )
    return "\n".join(parts)


def criteria_time(tree: dict[str, Any]) -> str:
    """Seconds of asking every criterion at every threshold, from benchmarks/criteria.py."""
    slowest = sorted(tree["seconds"], key=tree["seconds"].get, reverse=True)[:3]
    named = ", ".join(f"{word} {tree['seconds'][word]:.1f} s" for word in slowest)
    return (
        f"All {len(tree['seconds'])} criteria over all their thresholds on {tree['instances']} instances "
        f"({tree['layers']} layers, {tree['classes']} classes): {tree['total_seconds']:.1f} s, most of all {named} "
        f"(`{tree['command']}`, {tree['date'][:10]}, {tree['threads']} thread, load average "
        f"{tree['load_average']:.1f}, torch {tree['versions']['torch']}).\n"
    )


def own_answers(results: dict[str, dict[str, Any]]) -> str:
    """What the policy's own answers bring on instances kept from the exits, from benchmarks/answers.py."""
    if not results:
        return "Nothing is recorded yet.\n"
    header = ["method", "no loss: saved layers %", "against the first", "within 1: saved layers %", "against the first"]
    parts = []
    for tree in results.values():
        rows = []
        for name, method in tree["methods"].items():
            cells = [name]
            for point in POINTS:
                found = method[point]
                gain = "" if not rows else gain_text(found["against_max_probability"])
                cells += [f"{100 * found['saved_layers']:.1f}", gain]
            rows.append(cells)
        sizes = tree["sizes"][0]
        scores = [
            " ".join(f"{100 * value:.1f}" for value in np.mean(tree[key], axis=0))
            for key in ("exit_scores", "own_scores")
        ]
        parts.append(
            f"**{tree['task']}**: exits fitted to {sizes['exits']} instances, heads and policy to {sizes['policy']}, "
            f"measured on {sizes['measured']} more of those kept from the exits; seeds "
            f"{', '.join(map(str, tree['seeds']))} (`{tree['command']}`, {tree['date'][:10]}, torch "
            f"{tree['versions']['torch']}). Accuracy of the exits: {scores[0]} %; of the policy's answers: "
            f"{scores[1]} %.\n\n{markdown_table(header, rows)}"
        )
    return "\n".join(parts)


def policy_trials(tree: dict[str, Any]) -> str:
    """Learned policies against confidence, from benchmarks/policy_trials.py."""
    rows = [
        [
            one["task"],
            str(one["seed"]),
            str(one["instances"]),
            f"{one['gain']:+.2f}",
            f"{one['interval'][0]:+.2f} to {one['interval'][1]:+.2f}",
            "the policy" if one["better"] else "confidence",
        ]
        for one in tree["rows"]
    ]
    header = ["task", "seed", "instances new to it", "gain in area, points", "95 %", "who decides"]
    took = ", ".join(f"{one['seconds']:.0f}" for one in tree["rows"])
    return (
        f"{markdown_table(header, rows)}\n`{tree['command']}`, {tree['date'][:10]}, torch {tree['versions']['torch']}; "
        f"seconds each: {took}.\n"
    )


def _summary(tree: dict[str, Any]) -> list[list[str]]:
    rows = []
    for point, words in POINTS.items():
        gain, gap = (tree["difference"] or {}).get(point), (tree["gap_closed"] or {}).get(point)
        best = tree["best_baseline"][point]
        ours, other = (tree["methods"].get(key, {}).get(point) for key in (tree["ours"], best))
        rows.append(
            [
                tree["task"],
                tree["split"],
                f"{100 * tree['full_depth_score']['pooled']:.2f}",
                words,
                f"{100 * ours['saved_layers']:.1f}" if ours else "-",
                span(ours["interval"]) if ours else "-",
                method_name(tree, best) if best else "-",
                f"{100 * other['saved_layers']:.1f}" if other else "-",
                gain_text(gain) if gain else "-",
                f"{100 * tree['oracle']['saved_layers']:.1f}",
                f"{100 * gap:.0f} %" if gap is not None else "-",
            ]
        )
    return rows


def _comparison(tree: dict[str, Any]) -> str:
    said = "".join(f"- {sentence}.\n" for sentence in verdicts(tree))
    table = markdown_table(list(METHOD_HEADER), _cells(method_rows(tree)))
    groups = ""
    if len(tree["groups"]) > 1:
        groups = f"\n{markdown_table(list(GROUP_HEADER), _cells(group_rows(tree)))}"
    return f"{said}\n{_compare_origin(tree)}\n\n{table}{groups}"


def _cells(rows: list[Row]) -> list[list[str]]:
    """Cells of a table, those of ConsistentEE in bold."""
    return [[f"**{cell}**" for cell in row.cells] if row.ours else row.cells for row in rows]


def _compare_origin(tree: dict[str, Any]) -> str:
    versions = tree["versions"]
    return (
        f"{tree['num_instances']} instances, seeds {', '.join(map(str, tree['seeds']))}, {tree['replicates']} "
        f"replicates; {tree['date'][:10]}, {tree['machine']['cores']} cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )


def chaos(results: dict[str, Any]) -> str:
    """Faults, what was survived, and what was lost."""
    header = ["fault", "runs", "survived", "equal result", "lost, median s", "lost, most s"]

    def row(name: str, found: dict[str, Any]) -> list[str]:
        lost = [
            "-" if found[key] is None else f"{found[key]:.1f}" for key in ("lost_seconds_median", "lost_seconds_max")
        ]
        return [name, *(str(found[key]) for key in ("runs", "survived", "equal_result")), *lost]

    rows = [row(name, found) for name, found in results["faults"].items()] + [row("all", results["total"])]
    again = sum(len(found["missed"]) for found in results["faults"].values())
    origin = (
        f"`{results['command']}`, {results['date']}, {results['machine']}, Ray {results['versions']['ray']}; "
        f"{again} trials did not count (the harm did not hit, or a later fault ended the run).\n"
    )
    if results["not_run"]:
        origin += f"\nNot run so far: {'; '.join(results['not_run'])}.\n"
    return markdown_table(header, rows) + "\n" + origin


def scaling(results: dict[str, Any]) -> str:
    """Constants and the simulated updates."""
    c, a = results["constants"], results["assumptions"]
    header = ["runners", "learners", "draw ms", "of it barrier ms", "driver ms", "learn ms", "strict ms", "overlap ms"]
    names = ("draw", "barrier", "driver", "learn", "strict", "overlap")
    rows = [
        [str(row["runners"]), str(row["learners"]), *(f"{1e3 * row[name]:.1f}" for name in names)]
        for row in results["rows"]
    ]
    lines = [f"{number} learner(s): {_limit(found)}" for number, found in results["limits"].items()]
    return (
        f"Per batch of 256: sample {1e3 * c['sample']:.2f} ms (spread {c['spread']:.2f}), learn {1e3 * c['learn']:.2f} "
        f"ms, {c['answer_bytes'] / 1e3:.0f} kB of orders and answers; weights {c['weight_bytes'] / 1e6:.2f} MB; "
        f"latency {1e3 * c['latency']:.2f} ms, order {1e6 * c['order']:.0f} us, answer {1e6 * c['answer']:.0f} us, put "
        f"{1e3 * c['put']:.2f} ms. `{results['command']}`, {results['date']}, {results['cores']} cores, load average "
        f"{results['load_average']}. Assumed: {a['runners_per_node']} runners a node, "
        f"{a['bandwidth'] / 1e9:.2f} GB/s.\n\n"
        + markdown_table(header, rows)
        + "\n"
        + "".join(f"- {x}\n" for x in lines)
    )


def _limit(found: dict[str, Any]) -> str:
    parts = []
    if found["learner"] is not None:
        parts.append(f"learning takes longer than drawing from {found['learner']} runners on")
    if found["driver"] is not None:
        parts.append(
            f"the driver's calls take longer than a batch's drawing and learning from {found['driver']} runners on"
        )
    return "; ".join(parts) or "nothing limits up to 1000 runners"


def overhead(results: dict[str, Any]) -> str:
    """Seconds of a round on top of its work."""
    header = ["round", "overhead s", "state store", "policy phase", "dev", "task step"]
    rows = [
        [str(row["round"]), *(f"{row.get(name, 0.0):.1f}" for name in ("overhead", "store", "policy", "dev", "task"))]
        for row in results["rounds"]
    ]
    return markdown_table(header, rows) + (
        f"\nInitialisation, which starts the Ray Train workers: {results['initialisation']:.1f} s. "
        f"`{results['command']}`, {results['date']}, {results['cores']} cores, load average "
        f"{results['load_average']}, Ray {results['versions']['ray']}.\n"
    )


def inference(results: dict[str, Any]) -> str:
    """Time saved by layers saved, by model and batch size; and the guarantee."""
    header = [
        "model, batch size",
        "layers",
        "by tokens",
        "time",
        "time / layers",
        "by tokens",
        "plain",
        "alone",
        "nobody leaves",
        "off the wish",
    ]
    rows, promises = [], []
    for name, model in results["models"].items():
        for size, row in model["engine"].items():
            for clock, found in (("", row), (" (processor time)", row["by_processor_time"])):
                rows.append(
                    [
                        f"{name}, {size}{clock}",
                        f"{row['layer_speedup']:.2f}",
                        f"{row['layer_speedup_by_tokens']:.2f}",
                        *(f"{found[key]:.2f}" for key in ("speedup", "time_per_layer_speedup")),
                        f"{found['speedup'] / row['layer_speedup_by_tokens']:.2f}",
                        f"{found['time_per_layer_speedup_plain']:.2f}",
                        f"{found['time_per_layer_speedup_alone']:.2f}",
                        f"{100 * found['no_exit_overhead']:+.1f} %",
                        f"{100 * (found['speedup'] / model['asked_for'] - 1):+.1f} %",
                    ]
                )
        found = model["guarantee"]
        promises.append(
            f"- {name}: calibrated on {found['calibration_texts']} texts for at most {100 * found['max_loss']:g} point "
            f"at {100 * found['confidence']:g} %, over {found['splits']} splits: broken on the other half in "
            f"{100 * found['broken_on_the_other_half']:.1f} %, of a known whole in "
            f"{100 * found['broken_of_a_known_whole']:.1f} %; nothing certified in {100 * found['refused']:.1f} %; "
            f"{100 * found['saved_layers']:.0f} % of layers saved on average.\n"
        )
    where = results["where"]
    origin = (
        f"`{results['command']}`, {results['date']}: {where['cpu']}, one thread, torch {where['versions']['torch']}; "
        f"load average {results['load_average'][0]} before and {results['load_average'][1]} after; decisions in "
        f"{'compiled code' if where['compiled_decisions'] else 'numpy'}.\n"
    )
    return f"{markdown_table(header, rows)}\n{''.join(promises)}\n{origin}"


def on_gpu(results: dict[str, Any]) -> str:
    """Microseconds a text by batch size, and time saved by layers saved."""
    header = [
        "model, batch size",
        "full depth",
        "plain transformers",
        "exits",
        "nobody leaves",
        "layers",
        "time",
        "time / layers",
    ]
    small = results["model"]
    names = {"kernels": small, "torch": f"{small} without kernels"}
    rows = []
    for name, run in results["runs"].items():
        for size, row in run["engine"].items():
            took = {name: 1e6 * seconds / row["texts"] for name, seconds in row["seconds"].items()}
            each = (f"{took[name]:.0f} us" for name in ("full", "plain", "exits", "never"))
            figures = (f"{row[key]:.2f}" for key in ("layer_speedup", "speedup", "time_per_layer_speedup"))
            rows.append([f"{names.get(name, name)}, {size}", *each, *figures])
    large = results["runs"]["large"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    origin = f"`{results['command']}`, {results['date']}: {results['device']}, {versions}. "
    origin += f"float32 where nothing else is said. *Large*: {large['num_layers']} layers of {large['hidden_size']}, "
    origin += f"random weights; {results['texts']['large']} texts there and without kernels, else "
    origin += (
        f"{results['texts']['small']} (at batch size 1 at most {results['runs']['kernels']['engine']['1']['texts']})."
    )
    return f"{markdown_table(header, rows)}\n{origin}\n"


def dial(results: dict[str, Any]) -> str:
    """The dial's curve beside policies trained for one price each."""
    header = ["model, speed", "dial: mean exit layer", "accuracy", "one price: mean exit layer", "accuracy"]
    rows = [
        [
            f"{name}, {row['speed']:g}",
            f"{row['dial']['mean_exit_layer']:.2f}",
            f"{100 * row['dial']['accuracy']:.2f}",
            f"{row['alone']['mean_exit_layer']:.2f}",
            f"{100 * row['alone']['accuracy']:.2f}",
        ]
        for name, found in results["models"].items()
        for row in found["curve"]
    ]
    notes = "".join(
        f"- {name}: trained on {found['trained_on']} held-out texts, measured on {found['measured_on']}; full depth "
        f"{100 * found['full_depth']:.2f}.\n"
        for name, found in results["models"].items()
    )
    return f"{markdown_table(header, rows)}\n{notes}\n`{results['command']}`, {results['date']}.\n"


GOAL = "pooled-goal-"


def _served(kind: str) -> str:
    """A way of serving in words."""
    if kind.startswith(GOAL):
        return f"pooled, goal {kind.removeprefix(GOAL).replace('-', ' ')}"
    if kind.startswith("plain-"):
        size, _, wait = kind.removeprefix("plain-").partition("-")
        return f"plain batching, {size}" + (f" within {wait.replace('-', ' ')}" if wait else "")
    return {"full_depth": "full depth, plain batching", "pooled-through-ray": "pooled, asked through Ray"}.get(
        kind, kind
    )


def serving(results: dict[str, Any]) -> str:
    """Latency by load, and throughput at equal p95."""
    rows = [
        [
            _served(kind),
            f"{row['offered_per_s']:g}",
            f"{row['answered_per_s']:.1f}",
            f"{row['texts_per_s']:.0f}",
            *(f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
        ]
        for kind, found in results["rows"].items()
        for row in found
    ]
    load = markdown_table(["", "offered per s", "answered per s", "texts per s", "p50 ms", "p95 ms", "p99 ms"], rows)
    kinds = [kind for kind in results["rows"] if not kind.startswith(GOAL)]
    goals = any(kind.startswith(GOAL) for kind in results["rows"])
    through_ray = "pooled-through-ray" in results["rows"]

    def figure(found: float | None, digits: int) -> str:
        return "-" if found is None else f"{found:.{digits}f}"

    bounds = []
    for limit, found in results["throughput_at_p95_ms"].items():
        line = [f"{limit} ms", *(figure(found.get(kind), 1) for kind in kinds)]
        line.append(figure(results["pooled_vs_plain"][limit], 2))
        if through_ray:
            line.append(figure(results["through_ray_vs_plain"][limit], 2))
        if goals:
            line += [figure(found.get(f"{GOAL}{limit}-ms"), 1), figure(results["goal_vs_plain"][limit], 2)]
        bounds.append(line)
    header = ["p95 at most", *(f"{_served(kind)}, per s" for kind in kinds), "pooled / plain"]
    if through_ray:
        header.append("pooled, asked through Ray / plain")
    if goals:
        header += ["pooled with it as the goal, per s", "goal / plain"]
    equal = markdown_table(header, bounds)
    machine, versions = results["machine"], results["versions"]
    origin = (
        f"`{results['command']}` of {results['date'][:10]}: {machine['cpu']}, {machine['cores']} cores, torch "
        f"{versions['torch']}, Ray {versions['ray']}; load average at the end {machine['load_average_at_end']:.1f}.\n"
    )
    return f"{origin}\n{load}\n{equal}"


def _late_growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth once everything is warm: median of the last third less that of the middle third, by process."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    return {name: median(s[name] for s in last) - median(s[name] for s in middle) for name in samples[0]}


def _overload(results: dict[str, Any]) -> str:
    """More requests than any kind answers: what share of them is answered within the first goal, at the least load."""
    goal = next(kind.removeprefix(GOAL).removesuffix("-ms") for kind in results["rows"] if kind.startswith(GOAL))
    least = {kind: found[0] for kind, found in results["rows"].items()}
    shares = ", ".join(
        f"{_served(kind)} {100 * row[f'within_{goal}_ms']:.0f} % (p50 {row['p50_ms']:.0f}, p99 {row['p99_ms']:.0f} ms)"
        for kind, row in least.items()
    )
    return (
        f"- {least['pooled']['offered_per_s']:g} requests a second, more than are answered; share of them within "
        f"{goal} ms: {shares} (`{results['command']}`, {results['date'][:10]}).\n"
    )


def trials(results: dict[str, dict[str, Any]]) -> str:
    """What the server went through: a killed replica, a long load, random requests."""
    lines = []
    alone = results.get("serving-engine")
    if alone is not None:
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in alone["texts_per_s"].items())
        lines.append(
            f"- The model alone on one thread, {alone['texts']} single texts there from the start, no HTTP; texts "
            f"a second: {rates} (`{alone['command']}`, {alone['date'][:10]}).\n"
        )
    for found in (results[name] for name in sorted(results) if name.startswith("serving-load-")):
        sizes = found["texts_per_request"]
        plain = [kind for kind in found["rows"] if kind.startswith("plain")]
        ratios = ", ".join(
            f"{ratio:.2f} at {most} ms" if ratio else f"only plain batching keeps {most} ms"
            for most, ratio in found["pooled_vs_plain"].items()
            if ratio or any(rate for kind, rate in found["throughput_at_p95_ms"][most].items() if kind in plain)
        )
        aimed = ", ".join(
            f"{ratio:.2f} at {most} ms" for most, ratio in found.get("goal_vs_plain", {}).items() if ratio
        )
        if aimed:
            ratios += f"; with that p95 as its goal {aimed}"
        waits = dict.fromkeys(w for kind in plain for w in found["settings"][kind] if w.startswith("--deadline-ms"))
        joined = ", ".join(map(str, found["joined"]))
        lines.append(
            f"- Texts per request {', '.join(map(str, sizes))}, sentences per text {joined}, drawn; pooled at equal "
            f"p95 over the best of {', '.join(map(_served, plain))} ({' '.join(waits)}): {ratios} "
            f"(`{found['command']}`, {found['date'][:10]}).\n"
        )
    over = results.get("serving-overload")
    if over is not None:
        lines.append(_overload(over))
    for name in ("chaos", "soak", "fuzz"):
        found = results.get(f"serving-{name}")
        if found is None:
            lines.append(f"- {name}: not recorded yet.\n")
            continue
        if name == "chaos":
            said = (
                f"{found['killed']} times one of {found['replicas']} replicas killed under {found['offered_per_s']:g} "
                f"requests a second: {found['requests']} requests, {found['lost']} lost; p95 {found['p95_ms']:.0f} ms"
            )
        elif name == "soak":
            growth = ", ".join(f"{k} {v:+.1f} MB" for k, v in _late_growth(found["resident_mb"]).items())
            said = (
                f"{found['minutes']:g} minutes of {found['offered_per_s']:g} requests a second: "
                f"{found['answered']} of {found['requests']} answered; resident memory, median of the last third "
                f"of the time against that of the middle third: {growth}"
            )
        else:
            statuses = ", ".join(f"{status}: {count}" for status, count in found["statuses"].items())
            said = (
                f"{found['requests']} random requests: {found['server_errors']} answered with 5xx, "
                f"{found['undeclared_or_without_message']} with a status that the schema does not declare or without a "
                f"message ({statuses})"
            )
        lines.append(f"- {said} (`{found['command']}`, {found['date'][:10]}).\n")
    return "".join(lines)


def clock(results: dict[str, Any]) -> str:
    """The table of docs/generation.md, with its origin."""
    machine, versions, model = results["machine"], results["versions"], results["model"]
    rows = [[*cells, "yes" if met else "no"] for cells, met in generation_rows(results)]
    origin = (
        f"`{results['command']}` of {results['date'][:10]}: {model['family']}, {model['num_layers']} layers, hidden "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']}, {model['dtype']}, random weights, exit layers "
        f"drawn from a fixed distribution; {machine['cpu']}, one thread, load average at the end "
        f"{machine['load_average_at_end']:.1f}; torch {versions['torch']}, transformers {versions['transformers']}.\n"
    )
    header = [*GENERATION_HEADER, f"at least {results['target']:g}"]
    return f"{origin}\n{markdown_table(header, rows)}"


def order(results: dict[str, Any]) -> str:
    """The bounds of docs/generation.md, with their origin."""
    rows = [
        [
            case["name"],
            f"{case['cost'][0]:.2f}",
            f"{case['cost'][-1]:.2f}",
            *(f"{case[key][what]:.2f}" for key in ("steps", "best") for what in ("speedup", "share")),
        ]
        for case in results["cases"]
    ]
    batch = results["batch"]
    header = ["", "1 row, ms", f"{batch} rows, ms", "steps: speed-up", "share", "best order: speed-up", "share"]
    machine = results["machine"]
    origin = (
        f"`{results['command']}` of {results['date'][:10]}: batch {batch}, {machine['cpu']}, one thread, load average "
        f"at the end {machine['load_average_at_end']:.1f}, torch {results['versions']['torch']}.\n"
    )
    return f"{origin}\n{markdown_table(header, rows)}"


def curves(results: dict[str, Any]) -> str:
    """Decoders: every rule at equal speeds, and what Learn-then-Test allows."""
    if not results:
        return "Nothing is recorded yet.\n"
    parts = []
    for tree in results.values():
        seeds = ", ".join(str(seed["seed"]) for seed in tree["seeds"])
        parts.append(
            f"{tree['seeds'][0]['num_layers']} layers, seeds {seeds}: mean, least and greatest. "
            f"{tree['examples']} examples of test that the model is made to say, {tree['prompts']} prompts that it "
            f"goes on with for {tree['new_tokens']} tokens (`{tree['command']}`, {tree['date'][:10]}, torch "
            f"{tree['versions']['torch']}).\n\n{markdown_table(*curve_rows(tree))}\n"
            f"Learn-then-Test, at most {100 * tree['seeds'][0]['learn_then_test']['delta']:g} % of a response's tokens "
            f"changed, with confidence {100 * (1 - tree['seeds'][0]['learn_then_test']['level']):g} %:\n\n"
            f"{markdown_table(*proven_rows(tree))}"
        )
    return "\n".join(parts)


def written(results: dict[str, Any]) -> str:
    """Decoders: recorded runs."""
    if not results:
        return "Nothing is recorded yet.\n"
    runs = {name.removeprefix("writing-"): run for name, run in results.items()}
    origins = "".join(f"- {name}: {_origin(run)}\n" for name, run in sorted(runs.items()))
    return f"{markdown_table(*written_rows(runs))}\n{origins}"


# Marker -> (results file, table); of a name with a star, the table of all the files by name.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "sampling": ("sampling", sampling),
    "default": ("runs", default),
    "tasks": ("runs", tasks),
    "learning": ("learning-stackoverflow", learning),
    "clock": ("generation-clock", clock),
    "order": ("generation-order", order),
    "comparisons": ("compare-*", comparisons),
    "ablations": ("ablation-*", ablations),
    "chaos": ("chaos", chaos),
    "scaling": ("scaling", scaling),
    "overhead": ("overhead", overhead),
    "inference": ("inference", inference),
    "gpu": ("engine-gpu", on_gpu),
    "dial": ("dial", dial),
    "serving": ("serving-load", serving),
    "trials": ("serving-*", trials),
    "curves": ("curves-*", curves),
    "written": ("writing-*", written),
    "answers": ("answers-*", own_answers),
    "safe": ("policy-trials", policy_trials),
    "criteria": ("criteria", criteria_time),
}
# Image -> (results file, drawing).
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "learning.svg": ("learning-stackoverflow", learning_svg),
}


def rendered(page: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The text of a page with all its tables as the results say."""

    def table(found: re.Match[str]) -> str:
        file, make = TABLES[found[2]]
        if "*" in file:
            paths = sorted(results.glob(f"{file}.json"))
            tree = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        elif (results / f"{file}.json").is_file():
            tree = json.loads((results / f"{file}.json").read_text(encoding="utf-8"))
        else:
            return f"{found[1]}Not recorded yet.\n{found[3]}"
        return f"{found[1]}{make(tree)}{found[3]}"

    return MARKED.sub(table, page)


def main(words: list[str]) -> int:
    """Rewrite, or with ``--check`` compare; returns the exit code."""
    code = 0
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files = {path: rendered(path.read_text(encoding="utf-8")) for path in pages}
    for name, (file, draw) in FIGURES.items():
        tree = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))
        files[ROOT / "docs" / "images" / name] = draw(tree)
    for path, new in files.items():
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if new == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'differs from the results' if '--check' in words else 'rewritten'}")
        code = 1 if "--check" in words else code
        if "--check" not in words:
            path.write_text(new, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
