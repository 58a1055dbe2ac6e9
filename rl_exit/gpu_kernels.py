"""Triton's forms of ``native_exits.c`` and ``native_rows.c``; only :func:`rl_exit.gpu.kernels` imports it.

A GPU is not busy with a small model: what costs is the number of launches, some 15 microseconds each, and a decision of
torch operations has a hundred of them, more than two layers. Each of these is one. The slow twins are those of the C
files; tests hold them together. Triton reads annotations as part of a kernel, hence none but its own.
"""

import triton
import triton.language as tl

FIGURES = tl.constexpr(12)


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0, with the digits of a small x."""
    return tl.where(x < 0.02, x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25))), tl.log(1.0 + x))


@triton.jit(do_not_specialize=["tokens", "layer"], do_not_specialize_on_alignment=["lengths"])
def decide(
    hidden,  # [B,T,H], any float
    lengths,  # int64 [B]; read where PADDED
    exit_weight,  # [L,H,C], float32 like all that follow
    exit_bias,  # [L,C]
    scale,  # [L-1]; the answer heads are read where WIDE > 0
    answer_in,  # [L-1,H,A]
    answer_in_bias,  # [L-1,A]
    answer_out,  # [L-1,A,C]
    answer_out_bias,  # [L-1,C]
    policy_in,  # [1 or L-1,12,W]; the policy's are read where WIDTH > 0
    policy_in_bias,  # [L-1,W]
    policy_out,  # [1 or L-1,W]
    policy_out_bias,  # [L-1]
    before,  # [B,3C+3], memory of the layer below; not read where FIRST
    after,  # [B,3C+3], written
    answers,  # [B,C], written
    odds,  # [B], written
    leaving,  # bool [B], written: whether odds exceed cut
    tokens,
    layer,
    cut,
    log_classes,
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    POOLING: tl.constexpr,  # 0 cls, 1 mean, 2 last
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,  # of H
    BLOCK: tl.constexpr,  # of T
    C2: tl.constexpr,  # powers of two from C, A and W
    A2: tl.constexpr,
    W2: tl.constexpr,
):
    """One row: pooled state -> exit -> the policy's own answer -> figures -> policy head."""
    row = tl.program_id(0)
    head = layer - 1
    length = tl.load(lengths + row).to(tl.int32) if PADDED else tokens
    base = hidden + row.to(tl.int64) * tokens * SIZE
    c, a = tl.arange(0, C2), tl.arange(0, A2)
    real, wide = c < CLASSES, a < WIDE
    z = tl.load(exit_bias + head * CLASSES + c, mask=real, other=0.0)
    inner = tl.zeros([A2], tl.float32)
    if WIDE > 0:
        inner = tl.load(answer_in_bias + head * WIDE + a, mask=wide, other=0.0)
    for start in range(0, SIZE, CHUNK):
        h = start + tl.arange(0, CHUNK)
        there = h < SIZE
        state = tl.zeros([CHUNK], tl.float32)
        if POOLING == 1:
            for first in range(0, length, BLOCK):
                t = first + tl.arange(0, BLOCK)
                inside = (t[:, None] < length) & there[None, :]
                tile = tl.load(base + t[:, None] * SIZE + h[None, :], mask=inside, other=0.0)
                state += tl.sum(tile.to(tl.float32), 0)
            state = state / tl.maximum(length, 1).to(tl.float32)
        else:
            at = tl.maximum(length - 1, 0) if POOLING == 2 else 0
            state = tl.load(base + at * SIZE + h, mask=there, other=0.0).to(tl.float32)
        weight = tl.load(
            exit_weight + (head * SIZE + h[:, None]) * CLASSES + c[None, :],
            mask=there[:, None] & real[None, :],
            other=0.0,
        )
        z += tl.sum(state[:, None] * weight, 0)
        if WIDE > 0:
            weight = tl.load(
                answer_in + (head * SIZE + h[:, None]) * WIDE + a[None, :],
                mask=there[:, None] & wide[None, :],
                other=0.0,
            )
            inner += tl.sum(state[:, None] * weight, 0)
    if WIDE > 0:
        inner = 0.5 * inner * (1.0 + tl.erf(inner * 0.7071067811865476))
        weight = tl.load(
            answer_out + (head * WIDE + a[:, None]) * CLASSES + c[None, :],
            mask=wide[:, None] & real[None, :],
            other=0.0,
        )
        said = tl.sum(inner[:, None] * weight, 0)
        z = tl.load(scale + head) * z + said + tl.load(answer_out_bias + head * CLASSES + c, mask=real, other=0.0)
    tl.store(answers + row * CLASSES + c, z, mask=real)

    z = tl.where(real, z, float("-inf"))
    answer, top = tl.argmax(z, 0), tl.max(z, 0)
    chosen = c == answer
    others = real & (c != answer)
    apart = tl.where(others, z - top, 0.0)
    e = tl.where(others, tl.exp(apart), 0.0)
    rest, most = tl.sum(e, 0), tl.max(e, 0)
    whole = 1.0 / (1.0 + rest)
    entropy = _log1p(rest) - tl.sum(tl.where(e > 0.0, e * apart, 0.0), 0) * whole
    relative = entropy / log_classes
    p = tl.where(chosen, whole, e * whole)
    sure = -tl.log(tl.maximum(rest, 1e-30))
    kept: tl.constexpr = 3 * CLASSES + 3
    memory = after + row * kept
    total, votes = p, tl.where(chosen, 1.0, 0.0)
    run = 0.0
    same = 0.0
    share = 0.0
    below = 0.0
    mean = 0.0
    entropy_below = 0.0
    change = 0.0
    if not FIRST:
        old = before + row * kept
        last = tl.load(old + c, mask=real, other=0.0)
        summed = tl.load(old + CLASSES + c, mask=real, other=0.0)
        voted = tl.load(old + 2 * CLASSES + c, mask=real, other=0.0)
        part = 1.0 / head.to(tl.float32)
        same = tl.where(tl.load(old + 3 * CLASSES) == answer.to(tl.float32), 1.0, 0.0)
        run = same * (tl.load(old + 3 * CLASSES + 1) + 1.0)
        share = tl.sum(tl.where(chosen, voted, 0.0), 0) * part
        below = tl.sum(tl.where(chosen, last, 0.0), 0)
        mean = tl.sum(tl.where(chosen, summed, 0.0), 0) * part
        entropy_below = tl.load(old + 3 * CLASSES + 2) / log_classes
        change = 0.5 * tl.sum(tl.abs(p - last), 0)
        total += summed
        votes += voted
    tl.store(memory + c, p, mask=real)
    tl.store(memory + CLASSES + c, total, mask=real)
    tl.store(memory + 2 * CLASSES + c, votes, mask=real)
    tl.store(memory + 3 * CLASSES, answer.to(tl.float32))
    tl.store(memory + 3 * CLASSES + 1, run)
    tl.store(memory + 3 * CLASSES + 2, entropy)

    found = sure
    if WIDTH > 0:
        x0 = tl.minimum(tl.maximum(sure, -10.0), 10.0) / 3.0
        x1 = whole - most * whole
        x3 = tl.log(tl.maximum(relative, 1e-6)) / 3.0
        x10 = run / LAYERS
        squares = x0 * x0 + x1 * x1 + relative * relative + x3 * x3 + same * same + share * share + below * below
        squares += mean * mean + entropy_below * entropy_below + change * change + x10 * x10 + 1.0
        j = tl.arange(0, W2)
        use = j < WIDTH
        which = 0 if SHARED else head
        w = policy_in + which * (FIGURES * WIDTH) + j
        units = x0 * tl.load(w, mask=use, other=0.0)
        units += x1 * tl.load(w + WIDTH, mask=use, other=0.0)
        units += relative * tl.load(w + 2 * WIDTH, mask=use, other=0.0)
        units += x3 * tl.load(w + 3 * WIDTH, mask=use, other=0.0)
        units += same * tl.load(w + 4 * WIDTH, mask=use, other=0.0)
        units += share * tl.load(w + 5 * WIDTH, mask=use, other=0.0)
        units += below * tl.load(w + 6 * WIDTH, mask=use, other=0.0)
        units += mean * tl.load(w + 7 * WIDTH, mask=use, other=0.0)
        units += entropy_below * tl.load(w + 8 * WIDTH, mask=use, other=0.0)
        units += change * tl.load(w + 9 * WIDTH, mask=use, other=0.0)
        units += x10 * tl.load(w + 10 * WIDTH, mask=use, other=0.0)
        units += tl.load(w + 11 * WIDTH, mask=use, other=0.0)
        norm = tl.maximum(tl.sqrt(squares), 1e-6)
        units = units * (3.4641016151377544 / norm) + tl.load(policy_in_bias + head * WIDTH + j, mask=use, other=0.0)
        units = 2.0 * tl.sigmoid(2.0 * units) - 1.0  # tanh
        out = tl.load(policy_out + which * WIDTH + j, mask=use, other=0.0)
        found = tl.sum(units * out, 0) + tl.load(policy_out_bias + head)
    tl.store(odds + row, found)
    tl.store(leaving + row, found > cut)


@triton.jit(
    do_not_specialize=["start", "old_tokens", "tokens"],
    do_not_specialize_on_alignment=["rows", "lengths"],  # parts of one array, so that nothing is compiled in mid-flight
)
def gather(
    source,  # [B_i,T_i,H]
    rows,  # int64 [B_i'], which of them; read where CHOSEN
    lengths,  # int64 [B], of all rows of the result
    out,  # [B,T,H], written
    seen,  # bool [B,T], written
    start,  # of this source's rows in the result
    old_tokens,
    tokens,
    SIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,  # of T
    H2: tl.constexpr,  # a power of two from H
):
    """A block of tokens of one row; zeros behind its end. An empty row keeps its first position."""
    number, place = tl.program_id(0), tl.program_id(0) + start
    row = tl.load(rows + number) if CHOSEN else number.to(tl.int64)
    length = tl.load(lengths + place).to(tl.int32)
    t, h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, H2)
    there = tl.minimum(tl.maximum(length, 1), old_tokens)
    wanted = (t[:, None] < tokens) & (h[None, :] < SIZE)
    tile = tl.load(
        source + row * old_tokens * SIZE + t[:, None] * SIZE + h[None, :],
        mask=wanted & (t[:, None] < there),
        other=0.0,
    )
    tl.store(out + place.to(tl.int64) * tokens * SIZE + t[:, None] * SIZE + h[None, :], tile, mask=wanted)
    tl.store(seen + place.to(tl.int64) * tokens + t, t < tl.maximum(length, 1), mask=t < tokens)
