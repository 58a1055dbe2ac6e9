"""Rows of several batches as one padded batch: compiled code agrees with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_exit import native
from rl_exit.models.backbones import rows as subject
from rl_exit.models.backbones.rows import pad_rows


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((4, 9, 6), (1, 3, 6), (3, 12, 6))]
    return [*made, torch.randn((12, 2, 6), generator=generator).transpose(0, 1)]  # the last one not contiguous


CHOSEN = (np.array([2, 0]), None, np.array([], dtype=np.int64), np.array([1]))
LENGTHS = [torch.tensor(real) for real in ([8, 1, 5, 2], [3], [9, 9, 9], [1, 7])]  # of all rows of each batch
OWN = [5, 8, 3, 7]  # of the rows chosen
TOKENS = 8


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_each_row_is_there_up_to_its_length(compiled, dtype, monkeypatch):
    if not compiled:
        monkeypatch.setattr(subject, "_function", lambda: None)
    elif native.library(subject.SOURCE) is None:
        pytest.skip("no C compiler here")
    sources = [batch.to(dtype) for batch in batches()]
    before = [source.clone() for source in sources]
    made = pad_rows(sources, LENGTHS, CHOSEN, TOKENS)
    found = made.hidden
    assert found.shape == (4, TOKENS, 6) and found.dtype == dtype and found.isfinite().all()
    assert made.lengths.tolist() == OWN and made.lengths.dtype == torch.int64 and made.padded
    expected = [sources[0][2], sources[0][0], sources[1][0], sources[3][1]]
    for row, length, whole in zip(found, OWN, expected, strict=True):
        assert torch.equal(row[:length], whole[:length])
    assert found[2, 3:].eq(0).all(), "beyond a batch's own padding there are zeros"
    if compiled:
        assert made.seen is not None and torch.equal(
            made.seen[:, 0, 0], torch.arange(TOKENS) < torch.tensor(OWN)[:, None]
        )
    found.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True)), "the result has memory of its own"


@torch.inference_mode()
def test_an_empty_row_is_seen_at_its_first_position():
    one = torch.randn(2, 3, 4)
    found = pad_rows([one], [torch.tensor([0, 2])], [None], 2)
    assert torch.equal(found.hidden[0, 0], one[0, 0])
    assert found.lengths.tolist() == [0, 2] and found.padded
    if native.library(subject.SOURCE) is not None:
        assert found.seen[:, 0, 0].tolist() == [[True, False], [True, True]]
    nothing = pad_rows([torch.zeros(1, 0, 4), one], [torch.tensor([0]), torch.tensor([0, 2])], [None, None], 2)
    assert nothing.hidden.shape == (3, 2, 4) and nothing.hidden[0].eq(0).all()


def test_it_is_differentiable():
    source, lengths = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([3, 3])
    pad_rows([source, source], [lengths, lengths], [None, np.array([1])], 3).hidden.sum().backward()
    assert source.grad is not None and source.grad[:, 0, 0].tolist() == [1.0, 2.0]


@torch.inference_mode()
def test_batches_of_several_types_and_single_ones():
    one, two = torch.ones(2, 3, 4), torch.ones(1, 2, 4, dtype=torch.bfloat16)
    three, whole = torch.tensor([3, 3]), torch.tensor([2])
    found = pad_rows([one, two], [three, whole], [None, None], 3)
    assert found.hidden.dtype == torch.float32 and found.hidden.sum() == 2 * 3 * 4 + 2 * 4
    assert found.lengths.tolist() == [3, 3, 2] and found.padded
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(subject, "_function", lambda: None)
            again = pad_rows([one], [three], [None], 3)
            assert torch.equal(again.hidden, one) and again.hidden.data_ptr() != one.data_ptr() and not again.padded


@pytest.mark.parametrize("compiled", [True, False])
@torch.inference_mode()
def test_what_would_read_or_write_elsewhere_is_refused(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(subject, "_function", lambda: None)
    one, lengths = torch.ones(2, 3, 4), torch.tensor([3, 2])
    for row in (2, -1):
        with pytest.raises(IndexError):
            pad_rows([one], [lengths], [np.array([0, row])], 3)
    with pytest.raises(ValueError, match="more than 2 tokens"):
        pad_rows([one], [lengths], [None], 2)
    assert pad_rows([one], [lengths], [np.array([1])], 2).hidden.shape == (1, 2, 4)
