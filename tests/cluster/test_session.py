from __future__ import annotations

import pytest

from rl_exit.cluster.session import _check_size, cpus_needed, needs_ray, ray_session
from rl_exit.config import load_config
from rl_exit.errors import UserError


def test_a_local_run_without_workers_starts_no_ray() -> None:
    config = load_config()
    assert not needs_ray(config)
    with ray_session(config):
        import sys

        ray = sys.modules.get("ray")
        assert ray is None or not ray.is_initialized()


@pytest.mark.parametrize(
    "word",
    [
        "sampling.num_env_runners=1",
        "learners.num_learners=1",
        "task_step.num_workers=1",
        "cluster=auto",
        "algorithm=appo",
    ],
)
def test_whatever_happens_elsewhere_needs_ray(word: str) -> None:
    assert needs_ray(load_config(None, [word]))


def test_phases_alternate_so_the_largest_counts() -> None:
    config = load_config(None, ["sampling.num_env_runners=3", "learners.num_learners=1", "task_step.num_workers=2"])
    assert max(cpus_needed(config).values()) == 4


def test_a_cluster_that_is_too_small_names_the_key() -> None:
    config = load_config(None, ["sampling.num_env_runners=3", "learners.num_learners=2", "cluster=auto"])
    _check_size(config, {"CPU": 5.0})
    with pytest.raises(UserError, match=r"4 CPUs and sampling\.num_env_runners \+ .* asks for 5: 1 are missing"):
        _check_size(config, {"CPU": 4.0})


def test_missing_gpus_are_named() -> None:
    config = load_config(None, ["task_step.num_workers=2", "task_step.use_gpu=true"])
    with pytest.raises(UserError, match="1 GPUs and task_step asks for 2"):
        _check_size(config, {"CPU": 8.0, "GPU": 1.0})


def test_a_cluster_that_is_not_there_is_one_message() -> None:
    config = load_config(None, ["cluster=nowhere:x"])
    with pytest.raises(UserError, match="cluster=nowhere:x: cannot be reached"), ray_session(config):
        pass
