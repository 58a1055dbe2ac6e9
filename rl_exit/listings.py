"""Tables of what there is: tasks, configuration keys, predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rl_exit.data.registry import TaskInfo

SHOWN_CHARACTERS = 60


def tasks_table(tasks: Iterable[TaskInfo]) -> Table:
    """The tasks known by name, one row each."""
    table = Table(title="tasks", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in ("name", "classes", "metric", "columns", "origin"):
        table.add_column(header, no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for task in tasks:
        columns = ", ".join(name for name in (task.text, task.text_pair, task.label) if name)
        table.add_row(
            Text(task.name, style="bold"),
            str(task.classes or "any"),
            task.metric,
            columns,
            task.origin,
            Text(task.description),
        )
    return table


def algorithms_table(infos: Iterable[Any]) -> Table:
    """The algorithms known by name, one row each.

    Args:
        infos: From :func:`rl_exit.trainers.rllib.registry.algorithms`, which the core does not import.
    """
    table = Table(title="algorithms", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    table.add_column("good for", overflow="fold")
    for info in infos:
        table.add_row(Text(info.name, style="bold"), Text(info.what), Text(info.good_for))
    return table


def keys_table(keys: Iterable[tuple[str, str, str]]) -> Table:
    """Every configuration key with default and help."""
    table = Table(title="configuration keys", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("key", no_wrap=True, style="bold")
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for key, default, text in keys:
        table.add_row(key, Text(default), Text(text))
    return table


def predictions_table(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Label, probability and exit layer of each text."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("label", style="bold")
    table.add_column("probability", justify="right")
    table.add_column("exit layer", justify="right")
    table.add_column("text", overflow="fold")
    for text, row in zip(texts, rows, strict=True):
        short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
        probability = row["probabilities"][row["label_id"]]
        table.add_row(Text(row["label"]), f"{probability:.3f}", str(row["exit_layer"]), Text(short))
    return table


def inference_table(results: Mapping[str, Any]) -> Table:
    """Figures of ``rl-exit bench inference``, one row for each model and batch size."""
    table = Table(title="engine", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    headers = (
        "model",
        "batch",
        "layers, times fewer",
        "time, times less",
        "time/layers",
        "against plain",
        "batch alone",
    )
    for header in (*headers, "nobody leaves", "off what was asked for"):
        table.add_column(header, justify="right")
    for name, model in results["models"].items():
        for size, row in model["engine"].items():
            table.add_row(
                Text(name),
                size,
                f"{row['layer_speedup']:.2f}",
                f"{row['speedup']:.2f}",
                f"{row['time_per_layer_speedup']:.3f}",
                f"{row['time_per_layer_speedup_plain']:.3f}",
                f"{row['time_per_layer_speedup_alone']:.3f}",
                f"{row['no_exit_overhead']:+.1%}",
                f"{model['requested'][size] - 1.0:+.1%}",
            )
        promise = model["guarantee"]
        table.add_row(Text(name), "", f"guarantee broken in {promise['broken_on_the_other_half']:.1%} of halves")
    return table


def dial_table(found: Mapping[str, Any]) -> Table:
    """The dial beside policies trained for one price each."""
    title = f"dial, measured on {found['measured_on']}; full depth {found['full_depth']:.4f}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in ("speed", "price of a layer", "dial: layers", "accuracy", "one price: layers", "accuracy"):
        table.add_column(header, justify="right")
    for row in found["curve"]:
        figures = [row[who][what] for who in ("dial", "alone") for what in ("mean_exit_layer", "accuracy")]
        table.add_row(f"{row['speed']:.2f}", f"{row['alpha']:.4f}", *(f"{value:.4f}" for value in figures))
    return table


def costs_table(costs: Any) -> Table:
    """Measured times, milliseconds a batch, one row for each batch size and length.

    Args:
        costs: A :class:`rl_exit.costs.CostModel`.
    """
    where = costs.where
    title = (
        f"{where.get('device')}, {where.get('cpu')}, {where.get('threads')} threads, {where.get('dtype')}; ms a batch"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in ("texts", "tokens", "embeddings", "a layer", "an exit", "the policy", "exits and policy, share"):
        table.add_column(header, justify="right")
    for row, size in enumerate(costs.batch_sizes):
        for column, length in enumerate(costs.lengths):
            layer, exit_, policy = costs.layers[row, column].mean(), costs.exits[row].mean(), costs.policy[row].mean()
            table.add_row(
                str(size),
                str(length),
                *(f"{1e3 * value:.3f}" for value in (costs.embed[row, column], layer, exit_, policy)),
                f"{(exit_ + policy) / layer:.1%}",
            )
    return table


BENCH_MEASURES = (
    ("runner_vs_rllib", "runner / RLlib's runner, steps/s", ".0f"),
    ("runner_vs_bare", "runner / bare loop", ".2f"),
    ("pg_train_vs_bare", "PG train() / bare loop with update", ".2f"),
    ("ppo_train_vs_stock", "PPO train() / RLlib's PPO train()", ".1f"),
    ("bytes_per_trajectory", "bytes per trajectory between processes", ".1f"),
    ("private_mb_per_runner", "private memory of a remote runner, MB", ".0f"),
)
BENCH_RATES = (
    ("bare_sampling", "bare loop, sampling"),
    ("runner", "runner"),
    ("rllib_runner_sync", "RLlib's runner, 64 environments, sync"),
    ("rllib_runner_vector_entry_point", "RLlib's runner, 64 environments, vectorised"),
    ("bare_training", "bare loop, sampling and update"),
    ("pg_train", "PG train()"),
    ("ppo_train", "PPO train()"),
    ("ppo_stock", "RLlib's PPO train()"),
)
BENCH_PARTS = (
    ("gather", "runner: gather states"),
    ("policy_pass", "runner: policy pass"),
    ("draw", "runner: draw and rewards"),
    ("pg_sampling", "PG: sampling"),
    ("pg_learning", "PG: learning"),
    ("pg_rllib", "PG: RLlib around train()"),
)
BENCH_GROWTH = 0.15  # of the time of an epoch, beyond ten times, that ten times the instances may cost


def bench_rows(results: Mapping[str, Any]) -> tuple[list[str], list[tuple[list[str], bool | None]]]:
    """What ``rl-exit bench sampling`` has measured, as text.

    Args:
        results: From :func:`rl_exit.trainers.bench.sampling.run`.

    Returns:
        (header, rows); a row is its cells (measure, target, one per size) and whether every size meets the target,
        None where there is none. The scaling is that of the last size.
    """
    sizes, scaling = results["sizes"], results["scaling"]
    names = [f"N={one['num_instances']}, L={one['num_layers']}, H={one['hidden_size']}" for one in sizes]
    rows: list[tuple[list[str], bool | None]] = []
    for key, words, form in BENCH_MEASURES:
        bound, value = results["targets"][key]["bound"], results["targets"][key]["value"]
        meets = [one[key] >= value if bound == "at least" else one[key] <= value for one in sizes]
        rows.append(([words, f"{bound} {value:g}", *(f"{one[key]:{form}}" for one in sizes)], all(meets)))
    blank = ["-"] * (len(sizes) - 1)
    ratio, growth = scaling["epoch_ratio_10x"], scaling["private_mb_growth_10x"]
    target = f"{10 * (1 - BENCH_GROWTH):g} to {10 * (1 + BENCH_GROWTH):g}"
    rows.append(
        (["epoch with 10 times the instances", target, *blank, f"{ratio:.2f}"], abs(ratio / 10 - 1) <= BENCH_GROWTH)
    )
    rows.append((["private memory with 10 times the instances, MB", "no more", *blank, f"{growth:+.1f}"], None))
    for key, words in (("policy_pass_seconds_by_k", "policy pass"), ("batch_seconds_by_k", "whole batch")):
        shown = ", ".join(f"{1e3 * scaling[key][k]:.2f}" for k in ("1", "8", "64"))
        rows.append(([f"{words} of 256 instances at K=1, 8, 64, ms", "-", *blank, shown], None))
    for key, words in BENCH_PARTS:
        times = (one["milliseconds_per_batch"][key] for one in sizes)
        rows.append(([f"{words}, ms per batch", "-", *(f"{value:.2f}" for value in times)], None))
    rows.append((["policy pass, GFLOP/s", "-", *(f"{one['policy_pass_gflops']:.0f}" for one in sizes)], None))
    for key, words in BENCH_RATES:
        rates = (one["rates"][key]["steps_per_second"] for one in sizes)
        rows.append(([f"{words}, 1000 steps/s", "-", *(f"{rate / 1000:,.1f}" for rate in rates)], None))
    return ["measure", "target", *names], rows


def bench_table(results: Mapping[str, Any]) -> Table:
    """What ``rl-exit bench sampling`` has measured, one column per size; missed targets in red."""
    header, rows = bench_rows(results)
    table = Table(title="bench sampling", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, words in enumerate(header):
        table.add_column(words.replace(", ", ",\n"), justify="left" if index < 1 else "right", overflow="fold")
    styles = {True: "green", False: "red", None: ""}
    for cells, met in rows:
        table.add_row(*(Text(cell, style=styles[met] if index > 1 else "") for index, cell in enumerate(cells)))
    return table


GENERATION_HEADER = [
    "batch",
    "context",
    "full depth, tokens/s",
    "transformers, tokens/s",
    "with exits, tokens/s",
    "speed-up",
    "layer speed-up",
    "share",
    "deepest of batch",
]


def generation_rows(results: Mapping[str, Any]) -> list[tuple[list[str], bool]]:
    """What ``rl-exit bench generation`` has measured, as text: cells, and whether the target is met.

    Args:
        results: From :func:`rl_exit.trainers.bench.generation.run`.
    """
    rows = []
    for case in results["cases"]:
        rate = case["tokens_per_second"]
        cells = [
            str(case["batch"]),
            str(case["context"]),
            *(f"{rate[name]:.1f}" for name in ("full_depth", "transformers", "exits")),
            *(f"{case[name]:.2f}" for name in ("speedup", "layer_speedup", "share")),
            f"{case['deepest_of_batch']:.1f} of {results['model']['num_layers']}",
        ]
        rows.append((cells, case["share"] >= results["target"]))
    return rows


def generation_table(results: Mapping[str, Any]) -> Table:
    """What ``rl-exit bench generation`` has measured; shares below the target in red."""
    table = Table(title="bench generation", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for words in GENERATION_HEADER:
        table.add_column(words.replace(", ", ",\n"), justify="right")
    for cells, met in generation_rows(results):
        share = GENERATION_HEADER.index("share")
        color = "green" if met else "red"
        table.add_row(*(Text(cell, style=color if index == share else "") for index, cell in enumerate(cells)))
    return table
