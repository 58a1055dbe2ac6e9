"""Token states in blocks: a decoder's state store holds what the policy reads of some tokens, never more than allowed.

A response token is an instance of the store. What the policy phase needs of it are the policy's input at every exit,
the losses and which exits are right (the memorized layer follows); logits over a vocabulary are not kept. Where the
tokens of the training set take more than ``store.max_gib``, they are learnt in blocks: a block is built, the policy
trained on it, and the block removed before the next is built.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.criteria.base import Criterion
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.errors import UserError
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.token_measurement import blocks
from rl_exit.trainers.store_phase import model_fingerprint

POSITIONS = 1 << 20
"""A token's id is its example's times this, and its position in the example."""

_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SLACK = 0.95  # of the allowed size; Arrow's headers and padding take a little


def tokens_of(instances: Instances) -> npt.NDArray[np.int64]:
    """Episodes of each example: the tokens of its response, [N]."""
    return instances.lengths - instances.labels


def bytes_per_token(num_exits: int, width: int, dtype: str) -> int:
    """What a token takes in the store: id and label, and for every exit D numbers, the loss and a flag."""
    return 16 + num_exits * (width * _STORED_BYTES[dtype] + 4 + 1)


def plan_blocks(
    instances: Instances, num_exits: int, width: int, dtype: str, max_gib: float, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Cut the examples into blocks of about equal size, each a random part of them all.

    Args:
        instances: Tokenised examples.
        num_exits: E.
        width: D, numbers that the policy reads at an exit.
        dtype: Storage of the states.
        max_gib: Most GiB of a block.
        seed: Decides which examples are together.

    Returns:
        Rows of each block, ascending.

    Raises:
        UserError: One example alone takes more.
    """
    each = bytes_per_token(num_exits, width, dtype)
    most = int(_SLACK * max_gib * 2**30 // each)
    tokens = tokens_of(instances)
    if int(tokens.max()) > most:
        raise UserError(
            f"store.max_gib = {max_gib:g} holds {most} tokens of {each} bytes, and one response has "
            f"{int(tokens.max())}; raise it, or lower model.max_length"
        )
    order = np.random.default_rng(seed).permutation(len(instances))
    count = max(1, -(-int(tokens.sum()) // most))
    while True:
        share = np.array_split(order, count)
        if all(int(tokens[rows].sum()) <= most for rows in share):
            return [np.sort(rows) for rows in share]
        count += 1


def build_block(
    model: EarlyExitCausalModel,
    instances: Instances,
    path: Path,
    dtype: str,
    shard_size: int,
    batch_size: int,
    rule: Criterion | None = None,
    agreement: bool = False,
    on_done: Callable[[int], None] = lambda _: None,
) -> StateStore:
    """Write the store of some examples' tokens; one that is there is removed first.

    Args:
        model: Frozen decoder.
        instances: The examples of the block.
        path: Folder of the store.
        dtype: Storage of the states.
        shard_size: Tokens per shard; one shard is held in memory.
        batch_size: Examples per pass.
        agreement: Store as correct what the last exit says, in place of the token of the text.
        rule: Who leaves, so that later tokens see what those present; None: nobody.
        on_done: Told the number of tokens done.

    Raises:
        UserError: States that are not finite, no space on the device.
    """
    model.eval()
    shutil.rmtree(path, ignore_errors=True)
    done = 0
    with StateStoreWriter(
        path,
        model.num_exits,
        model.policy.hidden_size,
        int(model.head_weight.shape[0]),
        dtype,
        shard_size,
        keeps_logits=False,
        instances=instances.fingerprint,
        model=model_fingerprint(model),
    ) as writer:
        for block in blocks(model, instances, rule, batch_size):
            with torch.inference_mode():
                found = model.score_tokens(block.states, block.tokens.target)
                reads = model.policy_reads(block.states)
            examples = block.examples.numpy()
            place = block.tokens.position.cpu().numpy() + 1
            writer.append(
                instances.ids[examples] * POSITIONS + place,
                block.tokens.target.cpu().numpy(),
                reads.float().cpu().numpy(),
                found.losses.cpu().numpy(),
                (found.chosen == found.chosen[:, -1:] if agreement else found.correct).cpu().numpy(),
                np.empty((len(block), model.num_exits, 0), dtype=np.float32),
            )
            done += len(block)
            on_done(done)
    return StateStore.open(path)
