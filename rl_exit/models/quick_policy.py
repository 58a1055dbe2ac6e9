"""The policy that reads answers, on numpy: a tenth of the time for the few rows that an engine step has.

torch takes some 4 microseconds for the smallest operation, and figures and policy are fifty of them, which is a tenth
of a layer of a small model at batch size 1. The slow twins are :func:`rl_exit.models.answers.answer_figures` and
:meth:`rl_exit.models.policy.PolicyHeads.at`; tests hold them together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.models.answers import NUM_ANSWERS
from rl_exit.models.policy import PolicyHeads

Array = npt.NDArray[np.float32]
KEY = "answers"
MOST_CLASSES = 64  # above it numpy is as quick for one row


class QuickPolicy:
    """Log-odds of Exit from the logits of one layer after the other, float32 on the CPU.

    The heads' own memory is read, so weights that change in place are followed; :meth:`serves` says whether the heads
    still are where they were.

    Args:
        policy: Heads that read the answers alone, float32 on the CPU.
        num_classes: C.
    """

    def __init__(self, policy: PolicyHeads, num_classes: int) -> None:
        layers = self._layers = policy.num_layers
        self._classes = num_classes
        self._log_classes = math.log(num_classes)
        self._address = policy.weight_in.data_ptr()
        heads = range(layers - 1)
        which = [0 if policy.shared else index for index in heads]
        weight_in, weight_out, bias_in, self._bias_out = (
            weight.detach().numpy() for weight in (policy.weight_in, policy.weight_out, policy.bias_in, policy.bias_out)
        )
        self._weight_in = [weight_in[index] for index in which]
        self._weight_out = [weight_out[index] for index in which]
        self._bias_in = [bias_in[index] for index in heads]
        # Constant factors of the figures, in the order of answers.NAMES, at each layer.
        whole, third = 1.0 / self._log_classes, 1.0 / 3.0
        self._scales = [
            np.array([third, 1, whole, third, 1, below, 1, below, whole, 0.5, 1 / layers, 1], dtype=np.float32)
            for below in (1.0 / max(index, 1) for index in heads)
        ]

    def serves(self, policy: PolicyHeads) -> bool:
        """Whether it reads the memory of these heads."""
        return policy.weight_in.data_ptr() == self._address

    def at(self, layer: int, logits: Tensor, carry: dict[str, Tensor]) -> Tensor:
        """Log-odds of Exit, float32 [B].

        Args:
            layer: 1..L-1, asked in turn.
            logits: [B, C] on the CPU.
            carry: Keeps under ``"answers"`` one row for each: last probabilities, their sum, votes [3C], then the last
                answer, its run, and the entropy in nats.
        """
        if len(logits) == 1 and self._classes <= MOST_CLASSES:
            return self._at_one(layer, logits, carry)
        z: Array = logits.float().numpy()
        count, c = z.shape
        index = np.arange(count)
        answer = z.argmax(1)
        z = z - z[index, answer, None]
        others = np.exp(z)
        p = others.copy()
        others[index, answer] = 0.0
        rest = others.sum(1)  # of exp, without the answer's own 1: no digits are lost where the answer is nearly sure
        p /= (rest + 1.0)[:, None]
        entropy = np.log1p(rest) - np.einsum("ij,ij->i", p, z)
        best = p[index, answer]
        x = np.zeros((count, NUM_ANSWERS), dtype=np.float32)
        memory = np.empty((count, 3 * c + 3), dtype=np.float32)
        np.negative(np.log(np.maximum(rest, 1e-30)), out=x[:, 0])
        np.clip(x[:, 0], -10.0, 10.0, out=x[:, 0])
        x[:, 1] = best - others.max(1) / (rest + 1.0)
        x[:, 2] = entropy
        x[:, 3] = np.log(np.maximum(entropy * np.float32(1.0 / self._log_classes), 1e-6))
        x[:, 11] = 1.0
        if layer == 1:
            memory[:, :c] = memory[:, c : 2 * c] = p
            memory[:, 2 * c :] = 0.0
        else:
            before = carry[KEY].numpy()
            same = before[:, 3 * c] == answer
            x[:, 4] = same
            x[:, 5] = before[index, answer + 2 * c]
            x[:, 6] = before[index, answer]
            x[:, 7] = before[index, answer + c]
            x[:, 8] = before[:, 3 * c + 2]
            x[:, 9] = np.abs(p - before[:, :c]).sum(1)
            np.multiply(same, before[:, 3 * c + 1] + 1.0, out=x[:, 10])
            memory[:, :c] = p
            np.add(before[:, c : 2 * c], p, out=memory[:, c : 2 * c])
            memory[:, 2 * c : 3 * c] = before[:, 2 * c : 3 * c]
            memory[:, 3 * c + 1] = x[:, 10]
        memory[index, answer + 2 * c] += 1.0
        memory[:, 3 * c] = answer
        memory[:, 3 * c + 2] = entropy
        carry[KEY] = torch.from_numpy(memory)
        x *= self._scales[layer - 1]
        return self._heads(layer - 1, x)

    def _heads(self, head: int, x: Array) -> Tensor:
        """Log-odds of Exit [B] from figures [B, NUM_ANSWERS]."""
        scale = math.sqrt(NUM_ANSWERS) / np.sqrt(np.maximum(np.einsum("ij,ij->i", x, x), 1e-12))
        hidden = x @ self._weight_in[head]
        hidden *= scale[:, None]
        hidden += self._bias_in[head]
        np.tanh(hidden, out=hidden)
        out: Any = hidden @ self._weight_out[head] + self._bias_out[head]
        return torch.from_numpy(out)

    def _at_one(self, layer: int, logits: Tensor, carry: dict[str, Tensor]) -> Tensor:
        """As :meth:`at`, for one row: in plain numbers, where numpy's time for an operation is long."""
        z = logits[0].tolist()
        c = len(z)
        top = max(z)
        answer = z.index(top)
        e = [math.exp(value - top) for value in z]
        whole = math.fsum(e)
        p = [value / whole for value in e]
        e[answer] = 0.0
        rest = math.fsum(e)
        second = max(e) / whole
        best = p[answer]
        entropy = math.log1p(rest) - sum(share * (value - top) for share, value in zip(p, z, strict=True))
        relative = entropy / self._log_classes
        odds = min(max(-math.log(max(rest, 1e-30)), -10.0), 10.0) / 3.0
        x = [odds, best - second, relative, math.log(max(relative, 1e-6)) / 3.0]
        if layer == 1:
            x += [0.0] * 7
            run, total, votes = 0.0, p, [0.0] * c
        else:
            memory = carry[KEY][0].tolist()
            last, total, votes = memory[:c], memory[c : 2 * c], memory[2 * c : 3 * c]
            same = float(memory[3 * c] == answer)
            run = same * (memory[3 * c + 1] + 1.0)
            change = sum(abs(a - b) for a, b in zip(p, last, strict=True))
            below = layer - 1
            x += [
                same,
                votes[answer] / below,
                last[answer],
                total[answer] / below,
                memory[3 * c + 2] / self._log_classes,
            ]
            x += [0.5 * change, run / self._layers]
            total = [a + b for a, b in zip(total, p, strict=True)]
        x.append(1.0)
        votes[answer] += 1.0
        kept = [[*p, *total, *votes, answer, run, entropy]]
        carry[KEY] = torch.from_numpy(np.array(kept, dtype=np.float32))
        return self._heads(layer - 1, np.array([x], dtype=np.float32))
