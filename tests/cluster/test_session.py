from __future__ import annotations

from contextlib import nullcontext

import pytest

from rl_exit.cluster.session import needs_ray, ray_session
from rl_exit.config import load_config
from rl_exit.errors import UserError
from rl_exit.trainers.local_ray import start_local


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


@pytest.mark.parametrize("name", ["pgg", "no_such_module.Algorithm", "rl_exit.errors.UserError"])
def test_an_algorithm_that_is_not_there_is_told_before_ray_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    config = load_config(None, [f"algorithm={name}", "sampling.num_env_runners=1"])
    with pytest.raises(UserError, match=name), ray_session(config):
        pass


class Node:
    """In place of Ray's, which starts processes and then waits for them in its constructor."""

    ended = 0

    def __init__(self, failure: str) -> None:
        raise RuntimeError(failure)

    def kill_all_processes(self, check_alive: bool, allow_graceful: bool) -> None:
        type(self).ended += 1


class Starting:
    """In place of ``ray.init``: fails as often as told."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.tries = 0

    def __call__(self, address: str, **settings: object) -> None:
        self.tries += 1
        self.settings = settings
        if self.failures:
            Node(self.failures.pop(0))


RAYLET, GCS = "The current node timed out during startup.", "Timed out waiting for file gcs_server_port"


@pytest.mark.parametrize(
    ("failures", "tries", "ended", "error", "said"),
    [
        ((), 1, 0, None, ""),
        ((RAYLET,), 2, 1, None, ""),
        ((GCS,), 2, 1, None, ""),
        ((GCS, RAYLET), 2, 2, UserError, r"does not start .*\(2 attempts\).* during startup\. Its"),
        (("num_cpus is wrong",), 1, 0, RuntimeError, "num_cpus is wrong"),
    ],
)
def test_ray_that_is_slow_to_start_is_started_once_more(
    failures: tuple[str, ...],
    tries: int,
    ended: int,
    error: type[Exception] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting = Starting(*failures)
    monkeypatch.setattr("ray.init", starting)
    monkeypatch.setattr(Node, "ended", 0)
    with pytest.raises(error, match=said) if error else nullcontext():
        start_local(2)
    assert starting.tries == tries and Node.ended == ended
    assert starting.settings["_system_config"] == {"enable_metrics_collection": False}


@pytest.mark.parametrize("key", ["task_step.use_gpu", "learners.use_gpu"])
def test_a_gpu_that_this_process_lacks_is_told_at_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"{key}=true"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=f"{key}=true, but torch finds no GPU here"), ray_session(config):
        pass
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with ray_session(config) as plan:
        assert plan.phases == ()


def test_a_cluster_that_grows_is_asked_and_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.autoscaler.sdk

    from rl_exit.cluster import session

    asked: list[list[dict[str, int]]] = []

    def nodes() -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0 if asked else 1.0}}]

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(session, "POLL_SECONDS", 0.01)
    words = ["sampling.num_env_runners=3", "task_step.num_workers=2", "cluster=auto"]
    with pytest.raises(UserError, match="2 CPUs are missing"):
        session._fitting(load_config(None, words))
    plan = session._fitting(load_config(None, [*words, "placement.autoscale=true"]))
    assert plan.kept == frozenset() and asked == [[{"CPU": 1}] * 3]
    more = ["sampling.num_env_runners=5", "placement.autoscale=true", "placement.timeout=0.05"]
    with pytest.raises(UserError, match=r"1 CPU is missing.*it has not grown within 0\.05 s, placement\.timeout"):
        session._fitting(load_config(None, more))
