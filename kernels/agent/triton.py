"""Fused agent attention: both softmaxes and their gradients. No sum is atomic, so runs repeat bit by bit.

Names in the kernels: M runs over queries or keys, A over agents, D over the query and key dimension, V over the value
dimension. Tensors come with their strides (batch, token, head, dim), biases with theirs; addresses are in int64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._launch import launch
from zoo.kernels._symbols import ceil_div
from zoo.kernels.neighborhood.triton.common import load, store

PROGRAMS = 1024  # among which keys, or images where gradients of the biases add up, are split at most


@triton.jit
def locate(heads, tiles):
    """Of this program the head, the tile, and the image or part. Heads first: they share cache lines."""
    pid = tl.program_id(0)
    return (pid % heads).to(tl.int64), pid // heads % tiles, (pid // heads // tiles).to(tl.int64)


@triton.jit
def row_pointers(tensor, strides, batch, head, row, d):
    """Pointers [R, D] to rows of an image and a head."""
    rows = tensor + batch * strides[0] + head * strides[2] + row.to(tl.int64)[:, None] * strides[1]
    return rows + d[None, :] * strides[3]


@triton.jit
def load_rows(tensor, strides, batch, head, row, rows, d, dim):
    """[R, D], 0 beyond the last row."""
    return load(row_pointers(tensor, strides, batch, head, row, d), row < rows, d, dim, False)


@triton.jit
def store_rows(tensor, strides, batch, head, row, rows, d, dim, values):
    store(row_pointers(tensor, strides, batch, head, row, d), values, row < rows, d, dim, False)


@triton.jit
def load_bias(bias, strides, head, row, rows, col, cols):
    """[R, C] of a head's bias."""
    place = bias + head * strides[0] + row.to(tl.int64)[:, None] * strides[1] + col.to(tl.int64)[None, :] * strides[2]
    return tl.load(place, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)


@triton.jit
def gather_logits(
    a, k, bias, strides, head, m, keys, agent, agents, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """[A, M] of agents and keys, -inf beyond the last key."""
    logits = tl.dot(a, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        logits += load_bias(bias, strides, head, agent, agents, m, keys)
    return tl.where((m < keys)[None, :], logits, float("-inf"))


@triton.jit
def read_weights(
    q, a, bias, strides, head, m, queries, agent, agents, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """[M, A]: softmax over the agents of each query."""
    logits = tl.dot(q, tl.trans(a), input_precision=PRECISION) * scale
    if HAS_BIAS:
        logits += load_bias(bias, strides, head, m, queries, agent, agents)
    logits = tl.where((agent < agents)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def gather_kernel(
    agent_tokens,
    a_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,  # [heads, agents, keys]
    b_strides,
    sums,  # [batch, heads, parts, agents, v_dim], contiguous as are the next two
    tops,  # [batch, heads, parts, agents]
    totals,
    heads,
    keys,
    agents,
    dim,
    v_dim,
    scale,
    parts,
    turns,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per image, head and `turns` times M keys: an online softmax of all agents.

    If those are all keys, WHOLE, means and log-sum-exp are stored instead of sums, largest logits and totals.
    """
    head, part, batch = locate(heads, parts)
    agent, d, v_d = tl.arange(0, A), tl.arange(0, D), tl.arange(0, V)
    a = load_rows(agent_tokens, a_strides, batch, head, agent, agents, d, dim)
    acc = tl.zeros([A, V], dtype=tl.float32)
    top = tl.full([A], -1e30, dtype=tl.float32)
    total = tl.zeros([A], dtype=tl.float32)
    for turn in range(0, turns):
        m = (part * turns + turn) * M + tl.arange(0, M)
        k = load_rows(key, k_strides, batch, head, m, keys, d, dim)
        v = load_rows(value, v_strides, batch, head, m, keys, v_d, v_dim)
        logits = gather_logits(a, k, bias, b_strides, head, m, keys, agent, agents, scale, HAS_BIAS, PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights, shrink = tl.exp(logits - new_top[:, None]), tl.exp(top - new_top)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    rows = ((batch * heads + head) * parts + part) * agents + agent
    inside = agent < agents
    if WHOLE:
        acc /= total[:, None]
        top += tl.log(total)
    else:
        tl.store(totals + rows, total, mask=inside)
    store(sums + rows[:, None] * v_dim + v_d[None, :], acc, inside, v_d, v_dim, False)
    tl.store(tops + rows, top, mask=inside)


@triton.jit
def merge_kernel(
    sums,
    tops,
    totals,
    gathered,  # [batch, heads, agents, v_dim], contiguous
    lse,  # [batch, heads, agents], contiguous
    agents,
    v_dim,
    parts,
    A: tl.constexpr,
    V: tl.constexpr,
):
    """One program per image and head: what agents gathered from parts of the keys, put together."""
    image = tl.program_id(0).to(tl.int64)
    agent, v_d = tl.arange(0, A), tl.arange(0, V)
    inside = agent < agents
    acc = tl.zeros([A, V], dtype=tl.float32)
    top = tl.full([A], -1e30, dtype=tl.float32)
    total = tl.zeros([A], dtype=tl.float32)
    for part in range(0, parts):
        rows = (image * parts + part) * agents + agent
        part_top = tl.load(tops + rows, mask=inside, other=0.0)
        new_top = tl.maximum(top, part_top)
        shrink, weight = tl.exp(top - new_top), tl.exp(part_top - new_top)
        part_sums = load(sums + rows[:, None] * v_dim + v_d[None, :], inside, v_d, v_dim, False)
        acc = acc * shrink[:, None] + part_sums * weight[:, None]
        total = total * shrink + tl.load(totals + rows, mask=inside, other=1.0) * weight
        top = new_top
    rows = image * agents + agent
    store(gathered + rows[:, None] * v_dim + v_d[None, :], acc / total[:, None], inside, v_d, v_dim, False)
    tl.store(lse + rows, top + tl.log(total), mask=inside)


@triton.jit
def read_kernel(
    query,
    q_strides,
    agent_tokens,
    a_strides,
    gathered,
    g_strides,
    bias,  # [heads, queries, agents]
    b_strides,
    out,
    o_strides,
    heads,
    queries,
    agents,
    dim,
    v_dim,
    scale,
    tiles,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per image, M queries and head."""
    head, tile, batch = locate(heads, tiles)
    m, agent, d, v_d = tile * M + tl.arange(0, M), tl.arange(0, A), tl.arange(0, D), tl.arange(0, V)
    q = load_rows(query, q_strides, batch, head, m, queries, d, dim)
    a = load_rows(agent_tokens, a_strides, batch, head, agent, agents, d, dim)
    g = load_rows(gathered, g_strides, batch, head, agent, agents, v_d, v_dim)
    weights = read_weights(q, a, bias, b_strides, head, m, queries, agent, agents, scale, HAS_BIAS, PRECISION)
    values = tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
    store_rows(out, o_strides, batch, head, m, queries, v_d, v_dim, values)


@triton.jit
def read_backward_kernel(
    d_out,
    do_strides,
    query,
    q_strides,
    agent_tokens,
    a_strides,
    gathered,
    g_strides,
    bias,
    b_strides,
    d_query,
    dq_strides,
    d_agents,  # [batch, heads, tiles, agents, dim], float32, contiguous as are the next two
    d_gathered,  # [batch, heads, tiles, agents, v_dim]
    d_bias,  # [parts, heads, queries, agents]
    batches,
    heads,
    queries,
    agents,
    dim,
    v_dim,
    scale,
    tiles,
    parts,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per head, M queries and every one of `parts` images: what they add to the bias stays with it."""
    head, tile, part = locate(heads, tiles)
    m, agent, d, v_d = tile * M + tl.arange(0, M), tl.arange(0, A), tl.arange(0, D), tl.arange(0, V)
    inside = agent < agents
    total = tl.zeros([M, A], dtype=tl.float32)
    for batch in range(part, batches, parts):
        q = load_rows(query, q_strides, batch, head, m, queries, d, dim)
        a = load_rows(agent_tokens, a_strides, batch, head, agent, agents, d, dim)
        g = load_rows(gathered, g_strides, batch, head, agent, agents, v_d, v_dim)
        d_o = load_rows(d_out, do_strides, batch, head, m, queries, v_d, v_dim)
        weights = read_weights(q, a, bias, b_strides, head, m, queries, agent, agents, scale, HAS_BIAS, PRECISION)
        d_logits = tl.dot(d_o, tl.trans(g), input_precision=PRECISION)
        d_logits = weights * (d_logits - tl.sum(weights * d_logits, 1)[:, None])
        total += d_logits
        d_logits = d_logits.to(q.dtype)
        d_q = tl.dot(d_logits, a, input_precision=PRECISION) * scale
        store_rows(d_query, dq_strides, batch, head, m, queries, d, dim, d_q)
        d_a = tl.dot(tl.trans(d_logits), q, input_precision=PRECISION) * scale
        d_g = tl.dot(tl.trans(weights.to(d_o.dtype)), d_o, input_precision=PRECISION)
        rows = ((batch * heads + head) * tiles + tile) * agents + agent
        store(d_agents + rows[:, None] * dim + d[None, :], d_a, inside, d, dim, False)
        store(d_gathered + rows[:, None] * v_dim + v_d[None, :], d_g, inside, v_d, v_dim, False)
    if HAS_BIAS:
        rows = (part * heads + head) * queries + m
        store(d_bias + rows[:, None] * agents + agent[None, :], total, m < queries, agent, agents, False)


@triton.jit
def gather_backward_kernel(
    d_gathered,  # [batch, heads, agents, v_dim], float32, contiguous
    gathered,
    lse,
    agent_tokens,
    a_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    b_strides,
    d_key,
    dk_strides,
    d_value,
    dv_strides,
    d_agents,  # [batch, heads, tiles, agents, dim], float32, contiguous as is the next
    d_bias,  # [parts, heads, agents, keys]
    batches,
    heads,
    keys,
    agents,
    dim,
    v_dim,
    scale,
    tiles,
    parts,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per head, M keys and every one of `parts` images."""
    head, tile, part = locate(heads, tiles)
    m, agent, d, v_d = tile * M + tl.arange(0, M), tl.arange(0, A), tl.arange(0, D), tl.arange(0, V)
    inside = agent < agents
    total = tl.zeros([A, M], dtype=tl.float32)
    for batch in range(part, batches, parts):
        a = load_rows(agent_tokens, a_strides, batch, head, agent, agents, d, dim)
        k = load_rows(key, k_strides, batch, head, m, keys, d, dim)
        v = load_rows(value, v_strides, batch, head, m, keys, v_d, v_dim)
        rows = (batch * heads + head) * agents + agent
        place = rows[:, None] * v_dim + v_d[None, :]
        d_g = load(d_gathered + place, inside, v_d, v_dim, False)
        shift = tl.sum(d_g * load(gathered + place, inside, v_d, v_dim, False).to(tl.float32), 1)
        logits = gather_logits(a, k, bias, b_strides, head, m, keys, agent, agents, scale, HAS_BIAS, PRECISION)
        # Of agents beyond the last the logits are 0, and their gradients too.
        weights = tl.exp(logits - tl.load(lse + rows, mask=inside, other=0.0)[:, None])
        d_g = d_g.to(v.dtype)
        d_v = tl.dot(tl.trans(weights.to(v.dtype)), d_g, input_precision=PRECISION)
        store_rows(d_value, dv_strides, batch, head, m, keys, v_d, v_dim, d_v)
        d_logits = weights * (tl.dot(d_g, tl.trans(v), input_precision=PRECISION) - shift[:, None])
        total += d_logits
        d_logits = d_logits.to(k.dtype)
        d_k = tl.dot(tl.trans(d_logits), a, input_precision=PRECISION) * scale
        store_rows(d_key, dk_strides, batch, head, m, keys, d, dim, d_k)
        d_a = tl.dot(d_logits, k, input_precision=PRECISION) * scale
        rows = ((batch * heads + head) * tiles + tile) * agents + agent
        store(d_agents + rows[:, None] * dim + d[None, :], d_a, inside, d, dim, False)
    if HAS_BIAS:
        rows = (part * heads + head) * agents + agent
        store(d_bias + rows[:, None] * keys + m[None, :], total, inside, m, keys, False)


@triton.jit
def pool_kernel(
    x,  # [batch, height, width, DIM], the last axis of stride 1
    strides,
    out,  # [batch, SIDE, SIDE, DIM], contiguous
    height,
    width,
    DIM: tl.constexpr,
    SIDE: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """One program per image, bin and C channels."""
    BLOCKS: tl.constexpr = (DIM + C - 1) // C
    c, place = tl.program_id(0) % BLOCKS * C + tl.arange(0, C), (tl.program_id(0) // BLOCKS).to(tl.int64)
    i, j, batch = place // SIDE % SIDE, place % SIDE, place // (SIDE * SIDE)
    top, bottom = i * height // SIDE, ((i + 1) * height + SIDE - 1) // SIDE
    left, right = j * width // SIDE, ((j + 1) * width + SIDE - 1) // SIDE
    total = tl.zeros([M, C], dtype=tl.float32)
    for y in range(top, bottom):
        for first in range(left, right, M):
            z = first + tl.arange(0, M)
            row = x + batch * strides[0] + y * strides[1] + z * strides[2]
            inside = (z < right)[:, None] & (c < DIM)[None, :]
            total += tl.load(row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / ((bottom - top) * (right - left))
    tl.store(out + place * DIM + c, mean.to(out.dtype.element_ty), mask=c < DIM)


@triton.jit
def neighbors(i, size, length):
    """Between which two of `length` entries place `i` lies where they are stretched to `size`; weight of the second."""
    at = tl.maximum((i.to(tl.float32) + 0.5) * (length / size) - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), length - 1)
    return first, tl.minimum(first + 1, length - 1), at - first


@triton.jit
def between(line, stride, first, second, weight, inside):
    """Mean of two entries of a line, of which the second has this weight."""
    values = tl.load(line + first * stride, mask=inside, other=0.0).to(tl.float32) * (1.0 - weight)
    return values + tl.load(line + second * stride, mask=inside, other=0.0).to(tl.float32) * weight


@triton.jit
def map_bias_kernel(
    table,  # [heads, agents, table_height, table_width]
    strides,
    rows,  # [heads, agents, row_length]
    row_strides,
    cols,  # [heads, agents, col_length]
    col_strides,
    first,  # [heads, agents], of a token before the map
    first_strides,
    out,  # [heads, agents, tokens], float32
    out_strides,
    table_height,
    table_width,
    row_length,
    col_length,
    height,
    width,
    agents,
    PREFIX: tl.constexpr,
    AGENTS_LAST: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
):
    """One program per head and M tokens."""
    tokens = height * width + PREFIX
    tiles = (tokens + M - 1) // M
    head, m, agent = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M + tl.arange(0, M), tl.arange(0, A)
    if AGENTS_LAST:
        m, agent = m[:, None], agent[None, :]
    else:
        m, agent = m[None, :], agent[:, None]
    inside = (m < tokens) & (agent < agents)
    on_map = inside & (m >= PREFIX)
    y, z = (m - PREFIX) // width, (m - PREFIX) % width

    top, bottom, down = neighbors(y, height, table_height)
    left, right, across = neighbors(z, width, table_width)
    place = table + head * strides[0] + agent * strides[1]
    upper = between(place + top * strides[2], strides[3], left, right, across, on_map)
    lower = between(place + bottom * strides[2], strides[3], left, right, across, on_map)
    values = upper * (1.0 - down) + lower * down
    top, bottom, down = neighbors(y, height, row_length)
    place = rows + head * row_strides[0] + agent * row_strides[1]
    values += between(place, row_strides[2], top, bottom, down, on_map)
    left, right, across = neighbors(z, width, col_length)
    place = cols + head * col_strides[0] + agent * col_strides[1]
    values += between(place, col_strides[2], left, right, across, on_map)
    if PREFIX:
        place = first + head * first_strides[0] + agent * first_strides[1]
        values = tl.where(m < PREFIX, tl.load(place, mask=inside & (m < PREFIX), other=0.0).to(tl.float32), values)
    place = out + head.to(tl.int64) * out_strides[0] + agent.to(tl.int64) * out_strides[1]
    tl.store(place + m.to(tl.int64) * out_strides[2], values, mask=inside)


class _Problem:
    """Sizes that the kernels share, and how they hold them."""

    def __init__(self, query, key, value, agent):
        self.batch, self.queries, self.heads, self.dim = query.shape
        self.keys, self.v_dim, self.agents = key.shape[1], value.shape[3], agent.shape[1]
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.options = _options(self.agents, self.dim, self.v_dim, query.element_size(), precision)
        self.m = self.options["M"]

    def sizes(self, tokens: int) -> tuple[int, ...]:
        return self.heads, tokens, self.agents, self.dim, self.v_dim

    def split(self, programs: int, most: int) -> int:
        """In how many parts to do what would take so few programs, `most` at most."""
        return max(1, min(most, PROGRAMS // max(1, programs)))


@lru_cache
def _options(agents: int, dim: int, v_dim: int, element_size: int, precision: str) -> dict:
    a, d, v = (max(16, triton.next_power_of_2(x)) for x in (agents, dim, v_dim))
    m = max(16, min(128, 2**12 // a) // (element_size // 2))
    return {"M": m, "A": a, "D": d, "V": v, "PRECISION": precision, "num_warps": 4, "num_stages": 2}


def _bias(bias: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A bias whose rows are contiguous, and its strides. One that is absent is never read; any tensor does."""
    if bias is None:
        return other, (0, 0, 0)
    bias = bias if bias.stride(2) == 1 else bias.contiguous()
    return bias, bias.stride()


def forward(
    query, key, value, agent, agent_bias, query_bias, scale: float, query_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, contiguous; what agents gather, [batch, heads, agents, v_dim]; the log-sum-exp of their logits."""
    p = _Problem(query, key, value, agent)
    out = query.new_empty(p.batch, p.queries, p.heads, p.v_dim)
    gathered = query.new_empty(p.batch, p.heads, p.agents, p.v_dim)
    lse = query.new_empty(p.batch, p.heads, p.agents, dtype=torch.float32)
    if p.batch == 0:
        return out, gathered, lse
    images = p.batch * p.heads
    tiles = ceil_div(p.keys, p.m)
    turns = ceil_div(tiles, p.split(images, tiles))
    parts = ceil_div(tiles, turns)
    sums, tops, totals = gathered, lse, lse
    if parts > 1:
        sums = lse.new_empty(p.batch, p.heads, parts, p.agents, p.v_dim)
        tops, totals = lse.new_empty(2, p.batch, p.heads, parts, p.agents)
    inputs = agent, agent.stride(), key, key.stride(), value, value.stride(), *_bias(agent_bias, key)
    launch(
        gather_kernel,
        images * parts,
        (*inputs, sums, tops, totals, *p.sizes(p.keys), scale, parts, turns),
        {"WHOLE": parts == 1, "HAS_BIAS": agent_bias is not None} | p.options,
    )
    if parts > 1:
        options = {"A": p.options["A"], "V": p.options["V"], "num_warps": 4}
        launch(merge_kernel, images, (sums, tops, totals, gathered, lse, p.agents, p.v_dim, parts), options)
    if p.queries > 0:
        tiles = ceil_div(p.queries, p.m)
        by_token = gathered.transpose(1, 2)  # as the others are
        inputs = query, query.stride(), agent, agent.stride(), by_token, by_token.stride()
        inputs = *inputs, *_bias(query_bias, query), out, out.stride()
        launch(
            read_kernel,
            images * tiles,
            (*inputs, *p.sizes(p.queries), query_scale, tiles),
            {"HAS_BIAS": query_bias is not None} | p.options,
        )
    return out, gathered, lse


def backward(
    d_out, query, key, value, agent, agent_bias, query_bias, out, gathered, lse, scale: float, query_scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, agent, agent_bias and query_bias, None where there is none."""
    p = _Problem(query, key, value, agent)
    d_query, d_key, d_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))

    tiles = ceil_div(p.queries, p.m)
    parts = p.split(p.heads * tiles, p.batch)
    d_agents = lse.new_empty(p.batch, p.heads, tiles, p.agents, p.dim)
    d_gathered = lse.new_empty(p.batch, p.heads, tiles, p.agents, p.v_dim)
    d_query_bias = None if query_bias is None else lse.new_empty(parts, p.heads, p.queries, p.agents)
    by_token = gathered.transpose(1, 2)  # as the others are
    inputs = d_out, d_out.stride(), query, query.stride(), agent, agent.stride(), by_token, by_token.stride()
    outputs = d_query, d_query.stride(), d_agents, d_gathered, d_agents if d_query_bias is None else d_query_bias
    launch(
        read_backward_kernel,
        p.heads * tiles * parts,
        (*inputs, *_bias(query_bias, query), *outputs, p.batch, *p.sizes(p.queries), query_scale, tiles, parts),
        {"HAS_BIAS": query_bias is not None} | p.options,
    )
    d_agent, d_gathered = d_agents.sum(2), d_gathered.sum(2)

    tiles = ceil_div(p.keys, p.m)
    parts = p.split(p.heads * tiles, p.batch)
    d_agents = lse.new_empty(p.batch, p.heads, tiles, p.agents, p.dim)
    d_agent_bias = None if agent_bias is None else lse.new_empty(parts, p.heads, p.agents, p.keys)
    inputs = d_gathered, gathered, lse, agent, agent.stride(), key, key.stride(), value, value.stride()
    outputs = d_key, d_key.stride(), d_value, d_value.stride(), d_agents
    outputs = *outputs, d_agents if d_agent_bias is None else d_agent_bias
    launch(
        gather_backward_kernel,
        p.heads * tiles * parts,
        (*inputs, *_bias(agent_bias, key), *outputs, p.batch, *p.sizes(p.keys), scale, tiles, parts),
        {"HAS_BIAS": agent_bias is not None} | p.options,
    )
    d_agent = (d_agent + d_agents.sum(2)).transpose(1, 2).to(agent.dtype).contiguous()
    biases = ((d_agent_bias, agent_bias), (d_query_bias, query_bias))
    return d_query, d_key, d_value, d_agent, *(None if d is None else d.sum(0).to(x.dtype) for d, x in biases)


def pool(x: Tensor, side: int) -> Tensor:
    """[batch, height, width, channels] -> [batch, side * side, channels], contiguous: means of a grid of bins."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, height, width, dim = x.shape
    out = x.new_empty(batch, side * side, dim)
    bins = batch * side * side
    if bins > 0:
        options = _pool_options(bins, dim, side, width)
        programs = bins * ceil_div(dim, options["C"])
        launch(pool_kernel, programs, (x, x.stride()[:3], out, height, width), options)
    return out


@lru_cache
def _pool_options(bins: int, dim: int, side: int, width: int) -> dict:
    c = min(128, triton.next_power_of_2(dim))
    while c > 16 and bins * ceil_div(dim, c) < PROGRAMS:
        c //= 2
    m = max(1, min(2048 // c, triton.next_power_of_2(width // side)))
    return {"DIM": dim, "SIDE": side, "M": m, "C": c, "num_warps": 4 if m * c >= 1024 else 1}


def map_bias(
    table: Tensor, rows: Tensor, cols: Tensor, first: Tensor | None, height: int, width: int, agents_last: bool
) -> Tensor:
    """[heads, agents, tokens] or, `agents_last`, [heads, tokens, agents], contiguous, float32."""
    heads, agents = table.shape[:2]
    prefix = 0 if first is None else 1
    tokens = prefix + height * width
    shape = (heads, tokens, agents) if agents_last else (heads, agents, tokens)
    out = table.new_empty(shape, dtype=torch.float32)
    by_agents = out.transpose(1, 2) if agents_last else out
    first = table[:, :, 0, 0] if first is None else first
    tensors = [y for x in (table, rows, cols, first, by_agents) for y in (x, x.stride())]
    sizes = *table.shape[2:], rows.shape[2], cols.shape[2], height, width, agents
    options = _bias_options(prefix, agents_last, agents)
    launch(map_bias_kernel, heads * ceil_div(tokens, options["M"]), (*tensors, *sizes), options)
    return out


@lru_cache
def _bias_options(prefix: int, agents_last: bool, agents: int) -> dict:
    a = triton.next_power_of_2(agents)
    return {"PREFIX": prefix, "AGENTS_LAST": agents_last, "M": max(1, 2048 // a), "A": a, "num_warps": 4}
