from __future__ import annotations

import pytest

from rl_exit.cluster.session import needs_ray, ray_session
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


def test_a_cluster_that_is_not_there_is_one_message() -> None:
    config = load_config(None, ["cluster=nowhere:x"])
    with pytest.raises(UserError, match="cluster=nowhere:x: cannot be reached"), ray_session(config):
        pass
