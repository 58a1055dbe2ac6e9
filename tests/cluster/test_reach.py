from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rl_exit.cluster import reach
from rl_exit.cluster.reach import _sees, check_reach
from rl_exit.config import load_config
from rl_exit.errors import UserError


def nodes(count: int) -> list[dict[str, object]]:
    return [{"NodeID": f"n{i}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": True} for i in range(count)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A session of three nodes of which ``blind`` do not see what is laid for them."""
    state = SimpleNamespace(nodes=nodes(3), blind=[], asked=0)
    fake = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: state.nodes)

    def who(folder: Path, asked: list[str]) -> list[str]:
        state.asked += 1
        return [node for node in asked if node in state.blind]

    monkeypatch.setitem(__import__("sys").modules, "ray", fake)
    monkeypatch.setattr(reach, "_who_does_not_see", who)
    return state


def test_a_path_of_one_node_is_refused_with_the_nodes_that_do_not_see_it(cluster: SimpleNamespace) -> None:
    cluster.blind = ["n1", "n2"]
    for word, key in (("storage_path=/mine", "storage_path"), ("output_dir=/mine", "output_dir")):
        with pytest.raises(UserError, match=rf"{key}=/mine is a path of this node alone: 2 of 3 nodes .*10\.0\.0\.1"):
            check_reach(load_config(None, [word]))
    with pytest.raises(UserError, match="the memory of one process"):
        check_reach(load_config(None, ["storage_path=memory://x"]))


def test_what_all_nodes_see_is_accepted(cluster: SimpleNamespace) -> None:
    check_reach(load_config(None, ["storage_path=/shared"]))
    assert cluster.asked == 1
    cluster.blind = ["n1"]
    check_reach(load_config(None, ["storage_path=s3://bucket/runs", "output_dir=/mine"]))
    cluster.nodes = nodes(1)
    check_reach(load_config(None, ["output_dir=/mine"]))
    assert cluster.asked == 1  # neither needs a probe


def test_without_ray_nothing_is_asked() -> None:
    check_reach(load_config(None, ["output_dir=/nowhere"]))


def test_a_node_sees_a_file_by_listing_its_folder(tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    assert _sees(str(tmp_path / "probe"))
    assert not _sees(str(tmp_path / "other")) and not _sees(str(tmp_path / "none" / "probe"))
