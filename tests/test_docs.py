"""Every command of the documentation and every example is run, on a tiny backbone and tiny data."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import processes
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LONG = ("algorithms.md", "performance.md")  # several runs and benchmarks each
MOST = 600.0  # seconds of a command on a busy machine
# Commands that set up a machine; `make` targets are checked against the Makefile instead of being run.
# A server runs until it is ended: tests/cluster/test_serving.py has it and its requests.
SETUP = ("pip install", "git clone", "cd ", "python -m venv", "source ", "ray start", "ray stop")
SETUP += ("rl-exit serve", "curl ")
TINY = [
    "model.policy_width=8",
    "init.epochs=1",
    "init.batch_size=16",
    "policy.epochs=1",
    "policy.batch_size=64",
    "task_step.batch_size=16",
    "alternation.rounds=1",
    "task.max_train=96",
    "task.max_dev=40",
    "task.max_test=40",
]

# In place of the built-in text and a decoder's sizes.
WRITING = [
    "name=documentation",
    "task.name=local",
    "task.kind=generation",
    "task.path=data/prompts",
    "task.max_train=24",
    "task.max_dev=4",
    "task.max_test=4",
    "model.scratch.layers=2",
    "model.scratch.hidden=16",
    "model.scratch.heads=2",
    "model.scratch.vocabulary=300",
    "init.epochs=1",
    "policy.epochs=1",
    "generation.samples=2",
    "generation.max_new_tokens=4",
    "generation.points=1",
    "generation.encoder=none",
]


def commands(page: Path) -> list[str]:
    """Lines of the ``sh`` blocks of a page, continued lines joined, comments removed."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_task: Path) -> tuple[Path, dict[str, str]]:
    """A folder as the documentation supposes it: data, a finished run, and ``rl-exit`` on the path."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    rows = [json.loads(line) for line in (tiny_task / "train.jsonl").read_text().splitlines()]
    _write(folder / "data" / "stackoverflow", [{"text": r["text"], "label": i % 20} for i, r in enumerate(rows)])
    _write(folder / "data" / "sst2", [{"sentence": r["text"], "label": int(r["label"] == "tool")} for r in rows])
    _write(
        folder / "data" / "mrpc",
        [{"sentence1": r["text"], "sentence2": r["text"], "label": int(r["label"] == "tool")} for r in rows],
    )
    prompts = [{"prompt": "the old " + r["label"], "response": " " + r["text"]} for r in rows]
    _write(folder / "data" / "prompts", prompts[:40])
    csv = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
    (folder / "tickets.csv").write_text("\n".join(csv) + "\n")
    _write_decoder(folder / "my-decoder", tiny_backbone)
    (folder / "texts.txt").write_text("the old cat\na new hammer\n")
    tools = folder / "tools"
    tools.mkdir()
    local = [f"model.backbone={tiny_backbone}"]
    built_in = ["task.name=local", f"task.path={tiny_task}"]
    env = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RL_EXIT_TEST_WORDS": shlex.join(TINY + local),
        "RL_EXIT_TEST_TASK": shlex.join(built_in),
    }
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_docs import command"
    (tools / "rl-exit").write_text(f"#!{sys.executable}\n{here}; command(sys.argv[1:])\n")
    (tools / "rl-exit").chmod(0o755)
    words = [*TINY, *local, *built_in, "name=docstrings", "keep_rounds=all"]
    done = processes.run(command, ["train", "--quiet", *words], cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return folder, env


def _write_decoder(folder: Path, tokens_of: Path) -> None:
    """A decoder with exits, of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rl_exit.models.causal import EarlyExitCausalModel
    from rl_exit.models.pretrained import find_source, load_tokenizer

    tokenizer = load_tokenizer(find_source(str(tokens_of)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    EarlyExitCausalModel.from_model(LlamaForCausalLM(config), tokenizer).save_pretrained(folder)


def _write(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(words: list[str]) -> None:
    """What ``rl-exit`` does here: training is on the tiny backbone and, where no data is named, on the tiny task.

    Benchmarks measure for minutes by design; here each has one small case (a store, an algorithm, a context), and more
    of them are in their own tests. A speed is asked for by the cost model alone: what the clock says of a tiny model is
    chance.
    """
    from rl_exit.cli import main

    if words[:1] == ["calibrate"]:
        from rl_exit.operating import Clocked

        Clocked.bias = lambda *_: 1.0  # type: ignore[method-assign]

    if words[:2] == ["bench", "sampling"]:
        from rl_exit.trainers.bench import sampling, setup

        effort = setup.Effort(repetitions=1, batches=1, stock_steps=128, stock_share=0.02, growth=-1)
        sampling.run.__defaults__ = ((setup.Size(2000, 4, 32),), effort)

    if words[:2] == ["bench", "learning"]:
        from rl_exit.trainers.bench import learning

        learning.OPTIMA = learning.OPTIMA[:1]
        (learning.run.__kwdefaults__ or {}).update(algorithms=("pg",), seeds=(0,))

    if words[:2] == ["bench", "generation"]:
        from rl_exit.trainers.bench import generation

        generation.CASES = generation.CASES[:1]

    if words[:1] == ["train"] and "generation.yaml" in " ".join(words):
        words = [*words, *WRITING]
    elif words[:1] == ["train"]:
        given = " ".join(words)
        words = [*words, *shlex.split(os.environ["RL_EXIT_TEST_WORDS"])]
        if "task." not in given and "stackoverflow" not in given:
            words += shlex.split(os.environ["RL_EXIT_TEST_TASK"])
    sys.argv = ["rl-exit", *words]
    main()


def script(path: str, words: list[str]) -> None:
    """``python path words...``"""
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def run(line: str, desk: tuple[Path, dict[str, str]]) -> CompletedProcess[str]:
    """Run a line; what needs a shell gets one, the rest need not import everything again."""
    folder, env = desk
    words = shlex.split(line.replace("$RL_EXIT_TEST_WORDS", env["RL_EXIT_TEST_WORDS"]))
    if words[0] == "PYTHONPATH=examples:$PYTHONPATH":
        env = {**env, "PYTHONPATH": f"{folder / 'examples'}{os.pathsep}{env['PYTHONPATH']}"}
        words, line = words[1:], line.partition(" ")[2]
    if words[0] == "rl-exit" and not set("|<>;&$`*") & set(line):
        return processes.run(command, words[1:], cwd=folder, env=env, timeout=MOST)
    if words[0] == "python":
        return processes.run(script, words[1], words[2:], cwd=folder, env=env, timeout=MOST)
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=MOST
    )


@pytest.mark.timeout(1800)  # a page with many commands on a busy machine
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in LONG)) for page in PAGES]
)
def test_every_command_of_the_page_runs(page: Path, desk: tuple[Path, dict[str, str]]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in commands(page):
        if line.startswith("make"):
            assert set(line.split()[1:]) <= targets, f"{page.name}: `{line}` names no target of the Makefile"
        elif not line.startswith(SETUP):
            if line.startswith("rl-exit train") and "--resume" not in line:
                name = re.search(r"name=(\S+)", line.replace("task.name", ""))
                shutil.rmtree(desk[0] / "runs" / (name.group(1) if name else "stackoverflow"), ignore_errors=True)
            done = run(line, desk)
            assert done.returncode == 0, f"{page.name}: `{line}`\n{done.stderr[-2000:]}"


EXAMPLES = {
    "leave_early.py": ("runs/docstrings/model", "layer"),
    "step_the_environment.py": ("runs/docstrings", "never leave: return"),
    "add_an_algorithm.py": ("runs/docstrings", "add_an_algorithm.MovingBaseline: return"),
    "own_data.py": ("tickets.csv $RL_EXIT_TEST_WORDS", "runs/tickets/model"),
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_every_example_runs_and_shows_what_it_says(example: Path, desk: tuple[Path, dict[str, str]]) -> None:
    assert example.name in EXAMPLES, "say here how the example is run and what it prints"
    words, shown = EXAMPLES[example.name]
    done = run(f"python examples/{example.name} {words}", desk)
    assert done.returncode == 0, done.stderr[-2000:]
    assert shown in done.stdout


def test_tables_are_what_was_recorded() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, "run: python benchmarks/render.py"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
