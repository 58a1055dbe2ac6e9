"""``model.generate`` on texts and token ids: lossless, stop strings, streaming, pipelines, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from causal_models import CONFIGS, VOCABULARY, early_exit, library_model, ragged
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TextStreamer, pipeline
from typer.testing import CliRunner

from rl_exit import EarlyExitModel
from rl_exit.cli import app
from rl_exit.criteria import Fixed, criterion
from rl_exit.errors import ConfigError, DataError, ModelError
from rl_exit.models.causal import EarlyExitCausalModel

PROMPTS = ["w5 w6 w7", "w9", "w30 w31 w32 w33 w34 w35"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model(tokenizer) -> EarlyExitCausalModel:
    made = early_exit("llama", 2)
    made.tokenizer = tokenizer
    return made


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "draft"), [*((name, 3) for name in CONFIGS), ("llama", 1)])
def test_lossless_text_is_that_of_full_depth(name, draft):
    """Token for token, for a batch of ragged prompts, whatever the exits say."""
    library, model = library_model(name), early_exit(name)
    ids, mask = ragged([9, 4, 7, 1])
    given = {"attention_mask": mask, "max_new_tokens": 16, "eos_token_id": [2, 17], "pad_token_id": 0}
    full = model.generate(ids, threshold=1.0, **given)
    left = [row[: int(one.sum())] for row, one in zip(ids, mask, strict=True)]
    for row, prompt in enumerate(left):
        alone = library.generate(prompt[None], do_sample=False, **{**given, "attention_mask": None})[0, len(prompt) :]
        assert full[row, 9 : 9 + len(alone)].tolist() == alone.tolist()
    for rule in (None, Fixed(1), criterion("calm_softmax", threshold=0.2)):
        out = model.generate(
            ids, lossless=True, draft_tokens=draft, criterion=rule, return_dict_in_generate=True, **given
        )
        assert torch.equal(out.sequences, full)


def test_lossless_passes_are_fewer_than_tokens_where_drafts_are_right():
    """Where the exits say what the last layer says, a verification keeps the whole draft and gives one token more."""
    model = early_exit("llama")
    for layer in model.backbone.model.layers[2:]:  # layers 3 and 4 add nothing
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.exits.norms[1].weight.data.copy_(model.backbone.model.norm.weight.data)
    passes = []
    hook = model.backbone.model.layers[3].mlp.register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(
        torch.tensor([[5, 6, 7]]),
        lossless=True,
        draft_tokens=4,
        criterion=Fixed(2),
        max_new_tokens=21,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    hook.remove()
    assert len(passes) == 1 + 4, "the prompt, and four verifications of four drafts that give five tokens each"
    assert out.exit_layers[0].tolist() == [4, *([2, 2, 2, 2, 4] * 4)]


def test_texts_give_texts_with_the_layer_of_every_token(model, tokenizer):
    found = model.generate(PROMPTS, max_new_tokens=12, threshold=0.4)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompt, encoded, made in zip(PROMPTS, ids, found, strict=True):
        out = model.generate(torch.tensor([encoded]), max_new_tokens=12, threshold=0.4, return_dict_in_generate=True)
        assert made.prompt == prompt
        assert made.tokens == out.sequences[0, len(encoded) :].tolist()
        assert made.exit_layers == out.exit_layers[0].tolist() and made.exit_layers[0] == 4
        assert (prompt + made.text).split() == tokenizer.decode(encoded + made.tokens, skip_special_tokens=True).split()
        assert made.finish == ("eos" if made.tokens[-1] == 2 else "length")
        assert made.to_dict()["mean_exit_layer"] == sum(made.exit_layers) / len(made.exit_layers)
    assert model.generate(PROMPTS, max_new_tokens=12, threshold=0.4, batch_size=1) == found
    assert model.generate(PROMPTS[0], max_new_tokens=12, threshold=0.4) == found[:1]
    assert len({layer for made in found for layer in made.exit_layers}) >= 2
    assert model.generate([]) == []


def test_a_stop_string_ends_a_text(model):
    full = model.generate(PROMPTS, max_new_tokens=12, threshold=0.4)
    for lossless in (False, True):
        base = model.generate(PROMPTS, max_new_tokens=12, threshold=1.0) if lossless else full
        stop = base[0].text.split()[3]
        found = model.generate(PROMPTS, max_new_tokens=12, threshold=0.4, stop_strings=[f" {stop}"], lossless=lossless)
        for one, whole in zip(found, base, strict=True):
            assert one.text == whole.text.partition(f" {stop}")[0]
            assert one.finish == ("stop" if f" {stop}" in whole.text else whole.finish)
        assert found[0].finish == "stop" and found[0].tokens == base[0].tokens[: len(found[0].tokens)]


def test_the_stream_is_the_text(model):
    whole = model.generate(PROMPTS, max_new_tokens=9, threshold=0.4)
    texts, steps = [""] * 3, 0
    for events in model.stream(PROMPTS, max_new_tokens=9, threshold=0.4):
        steps += 1
        for event in events:
            texts[event.row] += event.piece
    assert texts == [made.text for made in whole] and steps == max(len(made.tokens) for made in whole)
    assert torch.is_inference_mode_enabled() is False


def test_a_streamer_of_transformers_is_fed(model, tokenizer, capsys):
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    for lossless in (False, True):
        given = {"max_new_tokens": 8, "threshold": 0.4, "lossless": lossless}
        out = model.generate(ids, streamer=TextStreamer(tokenizer), **given)
        assert capsys.readouterr().out.split() == tokenizer.decode(out[0]).split()
    with pytest.raises(ConfigError, match="one row"):
        model.generate(ids.repeat(2, 1), streamer=TextStreamer(tokenizer), lossless=True)


def test_it_is_the_model_of_a_pipeline(saved):
    """The same texts as the library's own model in the library's own pipeline, with exits off."""
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.can_generate()
    library = library_model("llama", 2)
    words = {"max_new_tokens": 10, "do_sample": False, "return_full_text": True}
    tokenizers = [AutoTokenizer.from_pretrained(saved) for _ in range(2)]
    ours = pipeline("text-generation", model=loaded, tokenizer=tokenizers[0])
    theirs = pipeline("text-generation", model=library, tokenizer=tokenizers[1])
    for batch_size in (1, 3):
        expected = theirs(PROMPTS, batch_size=batch_size, **words)
        assert ours(PROMPTS, batch_size=batch_size, threshold=1.0, **words) == expected
    assert ours(PROMPTS, threshold=0.4, **words) != expected
    torch.manual_seed(1)
    expected = theirs(PROMPTS[0], max_new_tokens=10, do_sample=True)
    assert ours(PROMPTS[0], max_new_tokens=10, do_sample=True, seed=1, threshold=1.0) == expected


def test_a_text_ends_where_positions_do(model):
    ids = torch.full((1, 120), 5)
    assert model.generate(ids, max_new_tokens=50, eos_token_id=None).shape[1] == 128
    with pytest.raises(DataError, match="positions for 128"):
        model.generate(torch.full((1, 128), 5))
    # A long neighbour does not shorten a text.
    long, short = torch.full((1, 125), 5), torch.tensor([[7, 9]])
    both = torch.zeros((2, 125), dtype=torch.int64)
    both[0], both[1, -2:] = long[0], short[0]
    mask = (both > 0).long()
    for words in ({}, {"lossless": True}):
        words = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "threshold": 0.4, **words}
        found = model.generate(both, attention_mask=mask, **words)[:, 125:]
        assert found[1].tolist() == model.generate(short, **words)[0, 2:].tolist()
        assert found.shape[1] > 3
        assert found[0].tolist() == model.generate(long, **words)[0, 125:].tolist() + [0] * (found.shape[1] - 3)


def test_what_cannot_be_generated_from_is_refused(model):
    with pytest.raises(DataError, match="a row without a single token"):
        model.generate(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(DataError, match="input_ids: a row without a single token"):
        model.generate(torch.tensor([[0, 0], [5, 6]]), pad_token_id=0)
    with pytest.raises(DataError, match="must both have shape"):
        model.generate(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 2))
    with pytest.raises(DataError, match=r"prompts\[1\]"):
        model.generate(["a", 3])
    with pytest.raises(ConfigError, match="either threshold or criterion"):
        model.generate(["w5"], threshold=0.5, criterion=Fixed(1))
    with pytest.raises(ModelError, match="no tokenizer"):
        early_exit("llama").generate(["w5"])
    assert model.generate([""], max_new_tokens=3) == model.generate([""], max_new_tokens=3)


@pytest.fixture
def cli():
    def run(*words: str, code: int = 0):
        done = CliRunner().invoke(app, ["generate", *words])
        assert done.exit_code == code, done.output
        return done

    return run


def test_the_command_writes_streams_and_tells(cli, saved, tmp_path, model):
    expected = model.generate(PROMPTS, max_new_tokens=8)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    rows = json.loads(cli(str(saved), *prompts, "--max-new-tokens", "8", "--json").stdout)
    assert rows == [made.to_dict() for made in expected]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    file = ["--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8"]
    told = cli(str(saved), *file)
    assert told.stdout.splitlines() == [made.prompt + made.text for made in expected]
    assert f"mean exit layer {expected[0].mean_exit_layer:.2f} of 4" in told.stderr
    assert cli(str(saved), *file, "--stream").stdout == told.stdout
    sampled = [*file, "--sample", "--temperature", "0.7", "--seed", "3", "--criterion", "fixed", "--param", "depth=2"]
    assert cli(str(saved), *sampled).stdout == cli(str(saved), *sampled).stdout != told.stdout
    exact = [cli(str(saved), *file, *words).stdout for words in (["--lossless"], ["--threshold", "1"])]
    assert exact[0] == exact[1]


def test_the_command_refuses_what_makes_no_sense(cli, saved, tmp_path, tiny_backbone):
    assert "--prompt or --file" in cli(str(saved), code=2).stderr
    assert "add --sample" in cli(str(saved), "--prompt", "w5", "--top-k", "3", code=2).stderr
    assert "one of them" in cli(str(saved), "--prompt", "w5", "--stream", "--json", code=2).stderr
    assert "greedy" in cli(str(saved), "--prompt", "w5", "--sample", "--lossless", code=2).stderr
    assert "no such file" in cli(str(saved), "--file", str(tmp_path / "none.txt"), code=2).stderr
    classifier = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=40)
    classifier.save_pretrained(tmp_path / "classifier")
    assert "it generates no text" in cli(str(tmp_path / "classifier"), "--prompt", "w5", code=2).stderr


@pytest.mark.shared
def test_a_trained_decoder_with_exits_off_is_the_library(shared_data):
    """stories260k, 8 ragged prompts: greedy, sampled with a seed, and lossless with exits on."""
    folder = shared_data / "models" / "stories260k"
    library = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = EarlyExitCausalModel.from_backbone(str(folder))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    words = text.split(" ")
    prompts = [" ".join(words[:count]) for count in (14, 2, 9, 5, 11, 3, 7, 4)]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    given = {"max_new_tokens": 60, "pad_token_id": 2, **batch}
    full = library.generate(**given, do_sample=False)
    assert torch.equal(model.generate(**given, threshold=1.0), full)
    assert torch.equal(model.generate(**given, lossless=True, criterion=Fixed(4)), full)
    assert not torch.equal(model.generate(**given, criterion=Fixed(4)), full)
    torch.manual_seed(0)
    expected = library.generate(**given, do_sample=True, temperature=0.9, top_p=0.95)
    assert torch.equal(
        model.generate(**given, threshold=1.0, do_sample=True, temperature=0.9, top_p=0.95, seed=0), expected
    )
