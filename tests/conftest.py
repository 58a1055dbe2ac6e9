"""What tests share: a tiny random backbone with its tokenizer, a tiny learnable task, the path of the shared data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ANIMALS, FILLER, TOOLS, write_tiny_task

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers step back behind whatever else runs (15), and starve beside the other tier of tests.
os.environ.setdefault("RAY_worker_niceness", "0")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, where it is installed, is first imported
os.environ.setdefault("RAY_enable_metrics_collection", "0")  # see rl_exit/trainers/local_ray.py; clusters of tests too
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the token would be written into the home directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared data are skipped, visibly, where it is absent; those that share a Ray session come last.

    The pages of the documentation come first: the longest of them, begun last, would run on alone.
    """
    items.sort(key=lambda item: ("local_ray" in getattr(item, "fixturenames", ()), item.path.name != "test_docs.py"))
    missing = pytest.mark.skip(reason="the shared development data is not here (RL_EXIT_SHARED)")
    for item in items:
        if "shared" in item.keywords and not _shared().is_dir():
            item.add_marker(missing)


def _shared() -> Path:
    return Path(os.environ.get("RL_EXIT_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with data/ and models/ of the development machines."""
    return _shared()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray session of 4 CPUs for all tests that want actors and no cluster of their own: each start takes seconds."""
    import ray

    from rl_exit.trainers.local_ray import start_local

    here = Path(__file__).parent
    # What processes of the session inherit; a runtime_env would have every worker started a second time.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here / "trainers")])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    start_local(4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny backbone."""
    return write_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny-bert")


def write_tiny_backbone(folder: Path) -> Path:
    """A BERT of 3 layers, H=32, random weights, with a word-level tokenizer of the tiny task's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys((*ANIMALS, *TOOLS, *FILLER))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny task."""
    return write_tiny_task(tmp_path_factory.mktemp("task") / "animals")


@pytest.fixture
def tiny_run(tiny_backbone: Path, tiny_task: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes a few seconds."""
    return [
        "name=tiny",
        f"output_dir={tmp_path / 'runs'}",
        "task.name=local",
        f"task.path={tiny_task}",
        f"model.backbone={tiny_backbone}",
        "model.policy_width=8",
        "init.epochs=3",
        "init.lr=2e-3",
        "init.batch_size=16",
        "policy.epochs=3",
        "policy.batch_size=64",
        "policy.lr=1e-2",
        "task_step.batch_size=16",
        "task_step.lr=5e-4",
        "alternation.rounds=1",
    ]
