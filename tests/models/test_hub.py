"""The model in other people's hands: transformers' pipeline, and the hub (a folder here)."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from transformers import pipeline

from rl_exit import EarlyExitModel
from rl_exit.errors import ModelError

TEXTS = ["the red cat", "saw", "my old hammer lost near a big dog", "drill under the horse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), policy_inputs="answers", policy_shared=True)
    path = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline_gives_the_same_answers(folder, batch_size):
    expected = EarlyExitModel.from_pretrained(folder).predict(TEXTS)
    classify = pipeline("text-classification", model=str(folder))
    found = classify(TEXTS, batch_size=batch_size)
    assert [answer["label"] for answer in found] == [answer.label for answer in expected]
    scores = [max(answer.probabilities) for answer in expected]
    assert [answer["score"] for answer in found] == pytest.approx(scores, abs=1e-5)
    assert {row["label"] for row in classify(TEXTS[:1], top_k=None)[0]} == {"a", "b"}


def test_push_to_hub_uploads_what_belongs_to_the_model(folder, tmp_path, monkeypatch):
    uploaded = tmp_path / "uploaded"
    asked = {}

    def create(self, repo_id, **options):
        asked["created"] = (repo_id, options["private"])

    def upload(self, *, repo_id, folder_path, **options):
        asked["uploaded"] = (repo_id, options)
        shutil.copytree(folder_path, uploaded)
        return f"commit of {repo_id}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "criteria").mkdir()
    (source / "criteria" / "lte.json").write_text("{}")
    (source / "costs.json").write_text("{}")  # of this machine: not uploaded
    model = EarlyExitModel.from_pretrained(source)
    assert model.push_to_hub("someone/model", private=True, commit_message="mine") == "commit of someone/model"
    assert asked == {"created": ("someone/model", True), "uploaded": ("someone/model", {"commit_message": "mine"})}
    assert (uploaded / "criteria" / "lte.json").is_file() and not (uploaded / "costs.json").exists()
    assert "Early-exit classifier" in (uploaded / "README.md").read_text()
    assert EarlyExitModel.from_pretrained(uploaded).predict(TEXTS) == model.predict(TEXTS)
    with pytest.raises(ModelError, match="branch unknown"):
        model.push_to_hub("someone/model", branch="main")


def test_a_hub_that_refuses_is_told(folder, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ModelError, match="'someone/model': offline"):
        EarlyExitModel.from_pretrained(folder).push_to_hub("someone/model")
