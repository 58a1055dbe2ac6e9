"""Pieces of text: whole characters, spaces kept, cut at stop strings wherever tokens end."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl_exit.generation.text import TextPieces


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that a character may take four of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture(scope="module")
def space_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word that begins with its space, which is dropped at a text's beginning (as SentencePiece does)."""
    words = ["▁once", "▁upon", "▁a", "▁time", ",", "▁there", "▁was"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TEXT = "Crème brûlée — 日本語 🎉👩‍🚀 STOP and more"


def shown(pieces: TextPieces, tokens: list[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(pieces.add(token))
        if pieces.stopped:
            break
    return [*found, pieces.end()]


def test_characters_are_shown_whole(byte_tokenizer):
    found = shown(TextPieces(byte_tokenizer), byte_tokenizer(TEXT).input_ids)
    assert "".join(found) == TEXT
    assert not any("�" in piece for piece in found)
    assert sum(map(bool, found)) == len(TEXT), "a piece for each character"


@pytest.mark.parametrize("stop", ["STOP", " STOP and", "🎉👩", "é", "C", "more", "TOP"])
def test_the_text_ends_before_a_stop_string(byte_tokenizer, stop):
    pieces = TextPieces(byte_tokenizer, [stop, "never there"])
    found = shown(pieces, byte_tokenizer(TEXT).input_ids)
    assert pieces.stopped and "".join(found) == TEXT.partition(stop)[0]


def test_what_only_begins_a_stop_string_is_held_back_and_given_in_the_end(byte_tokenizer):
    tokens = byte_tokenizer("a STO b ST").input_ids
    pieces = TextPieces(byte_tokenizer, ["STOP", " b c"])
    found = [pieces.add(token) for token in tokens]
    assert "".join(found) == "a STO b " and pieces.end() == "ST" and not pieces.stopped


def test_random_cuts_never_show_a_stop_string(byte_tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("abé🎉 ", k=rng.randint(1, 14)))
        stops = ["".join(rng.choices("abé🎉 ", k=rng.randint(1, 3))) for _ in range(2)]
        pieces = TextPieces(byte_tokenizer, stops)
        made = "".join(shown(pieces, byte_tokenizer(text).input_ids))
        first = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))
        # A stop string that ends first may begin later than another one that is completed after it.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        upto = min(ends, default=len(text))
        expected = min((at for at in (text[:upto].find(stop) for stop in stops) if at >= 0), default=len(text))
        assert made == text[:expected] and expected >= first


def test_the_space_after_the_prompt_is_kept(space_tokenizer):
    assert space_tokenizer.decode([0, 1]) == "once upon"
    assert "".join(shown(TextPieces(space_tokenizer, context=[0, 1]), [2, 3, 4, 5])) == " a time, there"
    assert "".join(shown(TextPieces(space_tokenizer), [2, 3])) == "a time"
    assert "".join(shown(TextPieces(space_tokenizer, [" time"], [0, 1]), [2, 3, 4])) == " a"


def test_bytes_that_never_become_a_character_come_at_the_end(byte_tokenizer):
    tokens = byte_tokenizer("a🎉").input_ids[:-1]
    found = shown(TextPieces(byte_tokenizer), tokens)
    assert found[0] == "a" and "".join(found) == byte_tokenizer.decode(tokens)
