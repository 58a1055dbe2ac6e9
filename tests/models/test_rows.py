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
LENGTHS = np.array([5, 8, 3, 7])  # of the rows chosen
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
    found = pad_rows(sources, CHOSEN, LENGTHS, TOKENS)
    assert found.shape == (4, TOKENS, 6) and found.dtype == dtype and found.isfinite().all()
    expected = [sources[0][2], sources[0][0], sources[1][0], sources[3][1]]
    for row, length, whole in zip(found, LENGTHS, expected, strict=True):
        assert torch.equal(row[:length], whole[:length])
    assert found[2, 3:].eq(0).all(), "beyond a batch's own padding there are zeros"
    found.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True)), "the result has memory of its own"


def test_it_is_differentiable():
    source = torch.randn(2, 3, 4, requires_grad=True)
    pad_rows([source, source], [None, np.array([1])], np.array([3, 3, 3]), 3).sum().backward()
    assert source.grad is not None and source.grad[:, 0, 0].tolist() == [1.0, 2.0]


@torch.inference_mode()
def test_batches_of_several_types_and_single_ones():
    one, two = torch.ones(2, 3, 4), torch.ones(1, 2, 4, dtype=torch.bfloat16)
    found = pad_rows([one, two], [None, None], np.array([3, 3, 2]), 3)
    assert found.dtype == torch.float32 and found.sum() == 2 * 3 * 4 + 2 * 4
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(subject, "_function", lambda: None)
            again = pad_rows([one], [None], np.array([3, 3]), 3)
            assert torch.equal(again, one) and again.data_ptr() != one.data_ptr()
