"""The tree holds its own rules: direction of imports, no Ray below the trainers, import guards, layout links."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rl_exit"
LAYERS = {"envs": 1, "trainers": 2, "cluster": 3, "cli": 4, "__main__": 4}  # everything else is core: 0


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> int:
    return LAYERS.get(parts[0].removesuffix(".py"), 0) if parts else 0


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = layer_of(path.relative_to(PACKAGE).parts)
    for name in imports_of(path):
        if name.startswith("rl_exit."):
            there = layer_of(tuple(name.split(".")[1:]))
            assert there <= here, f"{path.relative_to(ROOT)} (layer {here}) imports {name} (layer {there})"
        top = name.split(".")[0]
        if top == "ray":
            assert here >= LAYERS["trainers"], f"{path.relative_to(ROOT)} imports Ray below the trainers"
            assert not name.startswith("ray._private"), f"{path.relative_to(ROOT)} imports private parts of Ray"
        assert top not in ("pickle", "dill", "cloudpickle"), f"{path.relative_to(ROOT)} imports {top}"
    assert not re.search(
        r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|yaml\.unsafe|shell\s*=\s*True", path.read_text()
    )


def test_the_http_side_of_a_server_loads_no_torch() -> None:
    code = "import sys, rl_exit.serving.http, rl_exit.serving.writing_http, rl_exit.cluster.replicas as r; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cluster").rglob("*.py")), ids=lambda p: p.name)
def test_cluster_imports_no_torch_at_module_level(path: Path) -> None:
    assert not [n for n in imports_of(path, top_level_only=True) if n.split(".")[0] == "torch"]


@pytest.mark.parametrize("name", ["envs", "trainers", "cluster"])
def test_the_links_are_in_place_and_refuse_to_be_imported(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink() and link.resolve() == PACKAGE / name
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"import 'rl_exit.{name}'" in done.stderr


def test_importing_the_package_is_light() -> None:
    code = "import sys, rl_exit, rl_exit.cli\nprint([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_runs_without_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import rl_exit.inference, rl_exit.evaluation, rl_exit.report, rl_exit.models.early_exit, rl_exit.criteria\n"
        "import rl_exit.data.tasks, rl_exit.envs.episode, rl_exit.envs.vector, rl_exit.envs.sampler"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tests_mirror_the_package() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert (PACKAGE / folder).is_dir(), f"{path.relative_to(ROOT)} mirrors no package"
