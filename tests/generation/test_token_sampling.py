"""Settings: the words of transformers are honoured or refused, and their order of precedence holds."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from rl_exit.errors import ConfigError
from rl_exit.generation.sampling import Chooser, Settings, settings_of


def settled(defaults=None, given=None, prompt_tokens=5, **options):
    return settings_of(GenerationConfig(**(defaults or {})), given, options, prompt_tokens)[0]


def test_options_come_before_a_configuration_before_the_model():
    model = {"max_new_tokens": 7, "temperature": 0.3, "eos_token_id": [2, 3], "pad_token_id": 1}
    assert settled(model) == Settings(7, temperature=0.3, eos_token_ids=(2, 3), pad_token_id=1)
    given = GenerationConfig(max_new_tokens=9, temperature=0.5)
    assert settled(model, given).max_new_tokens == 9 and settled(model, given).temperature == 0.5
    assert settled(model, given, max_new_tokens=11).max_new_tokens == 11
    assert settled(model, given, max_new_tokens=11).temperature == 0.5


def test_the_defaults_are_those_of_transformers():
    assert settled() == Settings(20, False, 1.0, 50, 1.0)
    assert settled(eos_token_id=4) == Settings(eos_token_ids=(4,), pad_token_id=4)
    assert settled(max_length=12).max_new_tokens == 7
    assert settled({"max_length": 30}).max_new_tokens == 25
    assert settled({"max_length": 30}, max_new_tokens=3).max_new_tokens == 3
    assert settled({"max_length": 4}, max_new_tokens=3).max_new_tokens == 3  # what does not hold is not judged


def test_what_is_not_offered_is_refused_and_what_changes_nothing_is_not():
    assert settled(num_beams=1, use_cache=True, repetition_penalty=1.0, num_return_sequences=None) == Settings()
    for words, told in (
        ({"num_beams": 4}, "num_beams = 4 is not offered here"),
        ({"num_return_sequences": 2}, "not offered"),
        ({"temprature": 0.5}, "unknown. Did you mean 'temperature'"),
        ({"max_length": 5}, "the prompt has 5 tokens already"),
    ):
        with pytest.raises(ConfigError, match=told):
            settled(**words)
    with pytest.raises(ConfigError, match="num_beams"):
        settled(None, GenerationConfig(num_beams=3))


@pytest.mark.parametrize(
    "words",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"temperature": 0.0},
        {"temperature": 1e-39},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": True},
        {"draft_tokens": 0},
        {"stop_strings": ["a", ""]},
        {"stop_strings": [3]},
        {"lossless": True, "do_sample": True},
    ],
)
def test_values_out_of_range_are_refused(words):
    with pytest.raises(ConfigError):
        settled(**words)


def test_whole_numbers_are_numbers():
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
    whole, other = (
        Chooser(Settings(do_sample=True, seed=1, temperature=t, repetition_penalty=p, top_p=1), logits.device)
        for t, p in ((2, 3), (2.0, 3.0))
    )
    read = torch.tensor([[4, 5]])
    assert whole(read, logits) == other(read, logits)


def test_the_draw_of_a_row_does_not_depend_on_rows_that_have_ended():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    one = Chooser(Settings(do_sample=True, seed=1), logits.device)(torch.zeros(3, 1), logits)
    other = logits.clone()
    other[1] = 0.0
    two = Chooser(Settings(do_sample=True, seed=1), logits.device)(torch.zeros(3, 1), other)
    assert one[0] == two[0] and one[2] == two[2]
