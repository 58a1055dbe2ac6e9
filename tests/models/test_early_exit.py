"""The model as a transformers model: passes, saving and loading, Trainer and pipeline, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaModel, pipeline

from rl_exit import EarlyExitModel
from rl_exit.errors import ModelError, UserError
from rl_exit.models.card import model_card
from rl_exit.models.early_exit import EarlyExitConfig, Prediction
from rl_exit.models.exits import pool
from rl_exit.models.pretrained import load_tokenizer

LABELS = ("animal", "tool", "other")
TEXTS = ["the cat", "a big red hammer near the old saw", "my dog found a drill under the new wrench", "mouse"]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """A decoder whose tokenizer has no padding token."""
    from rl_exit.models.pretrained import find_source

    tokenizer = load_tokenizer(find_source(str(tiny_backbone)))
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest, tiny_backbone: Path, tiny_llama: Path) -> EarlyExitModel:
    folder = tiny_backbone if request.param == "bert" else tiny_llama
    return EarlyExitModel.from_backbone(str(folder), LABELS, policy_width=8, max_length=32)


@pytest.fixture
def bert(tiny_backbone: Path) -> EarlyExitModel:
    return EarlyExitModel.from_backbone(str(tiny_backbone), LABELS, policy_width=8, max_length=32)


def batch_of(model: EarlyExitModel, texts: list[str]) -> dict[str, torch.Tensor]:
    batch = model.tokenizer(texts, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def test_all_exits_reads_every_layer_of_the_backbone(model):
    """States equal the library's own hidden states, pooled."""
    batch = batch_of(model, TEXTS)
    out = model.all_exits(**batch)
    with torch.no_grad():
        library = model.backbone.model(**batch, output_hidden_states=True)
    expected = pool(library.last_hidden_state, batch["attention_mask"], model.config.pooling)
    torch.testing.assert_close(out.states[:, -1], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(out.states[:, -2], expected, atol=1e-5, rtol=0)
    if model.config.pooling == "cls":
        first = library.hidden_states[1][:, 0]
        torch.testing.assert_close(out.states[:, 0], first, atol=1e-5, rtol=0)
    assert out.states.shape == (4, model.num_layers, model.backbone.hidden_size)
    torch.testing.assert_close(out.logits, model.exits(out.states), atol=0, rtol=0)


def test_all_exits_carries_gradients_to_the_embeddings(bert):
    bert.train()
    bert.all_exits(**batch_of(bert, TEXTS)).logits[:, 0].sum().backward()
    layers = bert.backbone.model.encoder.layer
    assert bert.get_input_embeddings().weight.grad.abs().sum() > 0
    assert layers[0].output.dense.weight.grad.abs().sum() > 0
    assert layers[1].output.dense.weight.grad.abs().sum() == 0, "exit 1 must not reach layer 2"


@pytest.mark.parametrize("how", ["cls", "mean", "last"])
def test_pooling_ignores_padding(how):
    hidden = torch.arange(24, dtype=torch.float32).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = {
        "cls": torch.stack([hidden[0, 0], hidden[1, 0]]),
        "mean": torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]),
        "last": torch.stack([hidden[0, 3], hidden[1, 1]]),
    }[how]
    torch.testing.assert_close(pool(hidden, mask, how), expected)
    hidden[1, 2:] = 1e3
    torch.testing.assert_close(pool(hidden, mask, how), expected)
    hidden[1, :2] += 1
    assert not torch.allclose(pool(hidden, mask, how), expected)


def test_an_unknown_pooling_is_refused(tiny_backbone):
    with pytest.raises(ValueError, match="accepted: cls, mean, last"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "max")
    with pytest.raises(ModelError, match="accepted: cls, mean, last"):
        EarlyExitModel.from_backbone(str(tiny_backbone), LABELS, pooling="max")


def test_default_pooling_follows_the_family(tiny_backbone, tiny_llama):
    assert EarlyExitModel.from_backbone(str(tiny_backbone), LABELS, max_length=32).config.pooling == "cls"
    assert EarlyExitModel.from_backbone(str(tiny_llama), LABELS, max_length=32).config.pooling == "last"


def test_heads_follow_the_seed_and_leave_torchs_generator_alone(tiny_backbone):
    def fresh(seed: int) -> EarlyExitModel:
        return EarlyExitModel.from_backbone(str(tiny_backbone), LABELS, max_length=32, seed=seed)

    torch.manual_seed(5)
    first = fresh(0)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first.exits.weight, fresh(0).exits.weight)
    assert not torch.equal(first.exits.weight, fresh(1).exits.weight)


def test_training_loss_is_the_weighted_sum_over_exits(bert):
    """Eq. 2, against a loop; equal weights must not pass."""
    bert.exits.dropout.p = 0.0
    for module in bert.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bert.train()
    batch, labels = batch_of(bert, TEXTS), torch.tensor([0, 1, 2, 0])
    every = bert.all_exits(**batch).logits
    losses = [F.cross_entropy(every[:, index], labels) for index in range(bert.num_layers)]
    expected = sum((i + 1) * loss for i, loss in enumerate(losses)) / sum(range(1, bert.num_layers + 1))
    out = bert(**batch, labels=labels)
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=0)
    assert (out.exit_layer == bert.num_layers).all()
    assert not torch.isclose(torch.stack(losses).mean(), expected, atol=1e-6, rtol=0)


def test_evaluation_loss_is_that_of_the_exit_taken(bert):
    batch, labels = batch_of(bert, TEXTS), torch.tensor([0, 1, 2, 0])
    bert.config.threshold = 0.4
    out = bert(**batch, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert bert(**batch, return_dict=False)[0].shape == (4, 3)


def test_saved_and_loaded_it_answers_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
    loaded = EarlyExitModel.from_pretrained(tmp_path / "model")
    assert not loaded.training
    batch = batch_of(model, TEXTS)
    torch.testing.assert_close(loaded.all_exits(**batch).states, model.all_exits(**batch).states, atol=1e-6, rtol=0)
    assert loaded.predict(TEXTS) == model.predict(TEXTS)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    loaded.exits.bias.data[0] += 0.1
    assert loaded.predict(TEXTS, threshold=0.0) != model.predict(TEXTS, threshold=0.0)


def test_a_saved_model_names_no_path_of_this_machine(model, tmp_path, tiny_backbone, tiny_llama):
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        text = path.read_bytes()
        for secret in (tiny_backbone, tiny_llama):
            if path.name != "config.json":
                assert str(secret).encode() not in text, path.name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["backbone"].get("_name_or_path") is None


def test_auto_classes_open_it(bert, tmp_path):
    bert.save_pretrained(tmp_path / "model")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "model"), EarlyExitConfig)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path / "model")
        assert isinstance(loaded, EarlyExitModel)
        assert loaded.predict(TEXTS) == bert.predict(TEXTS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline_gives_the_same_answers(bert, tmp_path, batch_size):
    bert.config.threshold = 0.4
    bert.save_pretrained(tmp_path / "model")
    expected = bert.predict(TEXTS)
    for classify in (
        pipeline("text-classification", model=bert, tokenizer=bert.tokenizer),
        pipeline("text-classification", model=str(tmp_path / "model")),
    ):
        found = classify(TEXTS, batch_size=batch_size)
        assert [answer["label"] for answer in found] == [answer.label for answer in expected]
        for answer, prediction in zip(found, expected, strict=True):
            assert answer["score"] == pytest.approx(max(prediction.probabilities), abs=1e-5)


def test_trainer_trains_and_evaluates_it(bert, tmp_path):
    import numpy as np
    from transformers import Trainer, TrainingArguments

    bert.config.pooling = "mean"
    rows = [
        {**{k: v[0] for k, v in batch_of(bert, [text]).items()}, "labels": label}
        for text, label in zip(["the cat", "the saw"] * 16, [0, 1] * 16, strict=True)
    ]
    trainer = Trainer(
        model=bert,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            num_train_epochs=12,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="steps",
            save_steps=16,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    assert after["eval_accuracy"] == 1.0
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    # Saving the model into Trainer's folder leaves its checkpoints alone.
    bert.save_pretrained(tmp_path / "out")
    assert sorted((tmp_path / "out").glob("checkpoint-*")) == checkpoints and len(checkpoints) == 3
    assert (checkpoints[-1] / "optimizer.pt").exists()
    assert EarlyExitModel.from_pretrained(tmp_path / "out").predict(["the cat"])[0].label == "animal"


def test_saving_again_keeps_foreign_files(bert, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    bert.save_pretrained(folder, card="# first\n")
    bert.save_pretrained(folder, card="# second\n")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_text() == "# second\n"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_save_that_fails_leaves_the_old_model_whole(bert, tmp_path, monkeypatch, foreign):
    folder = tmp_path / "model"
    bert.save_pretrained(folder)
    if foreign:
        (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(bert.tokenizer), "save_pretrained", full)
    bert.exits.bias.data += 1
    with pytest.raises(UserError, match="no space left"):
        bert.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing left beside it"


def test_what_cannot_be_saved_is_refused(bert, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="a file stands"):
        bert.save_pretrained(tmp_path / "file")
    bert.tokenizer = None
    with pytest.raises(ModelError, match="no tokenizer"):
        bert.save_pretrained(tmp_path / "model")


def test_model_card_has_header_results_and_usage(bert):
    rows = [{"split": "dev", "score": 0.91234}, {"split": "test|x", "score": 0.9}]
    card = model_card(bert.config, bert.num_layers, rows, notes="Trained for a test.", where="org/model")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    import yaml

    assert yaml.safe_load(head)["pipeline_tag"] == "text-classification"
    assert "base_model" not in yaml.safe_load(head), "a folder is no base model on the hub"
    assert "| dev | 0.9123 |" in body and "| test\\|x | 0.9000 |" in body
    assert 'from_pretrained("org/model")' in body and "Trained for a test." in body


def test_predictions_are_plain_json(bert):
    found = bert.predict(TEXTS)
    assert json.loads(json.dumps([answer.to_dict() for answer in found])) == [answer.to_dict() for answer in found]
    assert all(isinstance(answer, Prediction) and sum(answer.probabilities) == pytest.approx(1) for answer in found)
    assert all(answer.label == LABELS[answer.label_id] for answer in found)


@pytest.mark.parametrize(
    ("names", "told"),
    [(["one"], "two or more"), (["a", "a"], "different"), (["a", ""], "non-empty"), ([0, 1], "strings")],
)
def test_label_names_are_checked(tiny_backbone, names, told):
    with pytest.raises(ModelError, match=told):
        EarlyExitModel.from_backbone(str(tiny_backbone), names)


@pytest.mark.parametrize("length", [2, 129])
def test_length_beyond_the_positions_is_refused(tiny_backbone, length):
    with pytest.raises(ModelError, match="accepts 4 to 128 tokens"):
        EarlyExitModel.from_backbone(str(tiny_backbone), LABELS, max_length=length)


class TestLoading:
    """Every broken folder ends with one message that says what is wrong."""

    @pytest.fixture
    def saved(self, bert: EarlyExitModel, tmp_path: Path) -> Path:
        bert.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def refused(self, folder: object, told: str) -> None:
        with pytest.raises(ModelError, match=told) as caught:
            EarlyExitModel.from_pretrained(folder)
        assert str(folder) in str(caught.value)

    def test_missing_folder(self, tmp_path):
        self.refused(tmp_path / "nowhere", "no such folder")

    def test_folder_without_a_model(self, tmp_path):
        self.refused(tmp_path, "no config.json")

    def test_file_in_place_of_a_folder(self, saved):
        self.refused(saved / "model.safetensors", "a file; a model is a folder")

    def test_model_of_another_type(self, tiny_backbone):
        self.refused(tiny_backbone, "a model of type 'bert', not an early-exit model")

    def test_config_that_is_no_json(self, saved):
        (saved / "config.json").write_text("{")
        self.refused(saved, "cannot be read as a model's configuration")

    @pytest.mark.parametrize("keep", [0, 7, 400, 0.9])
    def test_truncated_weights(self, saved, keep):
        weights = saved / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
        self.refused(saved, "truncated or damaged")

    @pytest.mark.parametrize(
        ("change", "told"), [("missing", "missing weights: exits.bias"), ("more", "unexpected weights: x")]
    )
    def test_weights_that_do_not_fit(self, saved, change, told):
        from safetensors.torch import load_file, save_file

        weights = load_file(saved / "model.safetensors")
        if change == "missing":
            del weights["exits.bias"]
        else:
            weights["x"] = torch.zeros(1)
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        self.refused(saved, told)

    def test_weights_of_another_size(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config["policy_width"] = 9
        (saved / "config.json").write_text(json.dumps(config))
        self.refused(saved, r"mismatched weights: policy\.bias_in")

    def test_no_weights(self, saved):
        (saved / "model.safetensors").unlink()
        self.refused(saved, "no weights there")

    def test_pickle_only(self, saved):
        (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
        self.refused(saved, "pickle form only")

    def test_no_tokenizer(self, saved):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (saved / name).unlink()
        self.refused(saved, "no tokenizer there")

    def test_unknown_backbone_family(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config["backbone"]["model_type"] = "perceptron"
        (saved / "config.json").write_text(json.dumps(config))
        self.refused(saved, "perceptron")

    def test_hub_id_without_network(self):
        self.refused("org/model-that-is-nowhere", "the hub .* cannot be reached")
