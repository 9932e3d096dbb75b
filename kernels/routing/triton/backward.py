"""Fused backward pass. Shares are recomputed from the log-sum-exp; no sum is atomic, so runs repeat bit by bit.

Two kernels: the gradient of the queries (tiles of queries, as in the forward pass), and those of keys and values (tiles
of keys against the regions that chose theirs).
"""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import LOG2E, load, store
from zoo.kernels.routing.triton.common import locate, position, token_pointers, token_rows


@triton.jit
def query_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    routes,
    weights,
    out,
    o_strides,
    lse,
    d_out,
    do_strides,
    shift,  # [batch, height, width, heads], written for the other kernel: sum(out * d_out)
    d_query,
    dq_strides,
    d_weights,  # [batch, heads, regions, tiles, topk, tokens of a region]; the caller sums
    height,
    width,
    heads,
    dim,
    regions,
    cols,
    region_y,
    region_x,
    topk,
    tiles,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SOFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, region, tile = locate(tl.program_id(0), heads, tiles, regions)
    tokens = region_y * region_x
    m, n, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    qy, qx, q_inside = position(region, m, height, width, cols, region_y, region_x)
    q_inside = q_inside & (m < tokens)
    q = load(token_pointers(query, q_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
    o = load(token_pointers(out, o_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
    do = load(token_pointers(d_out, do_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
    rows = token_rows(batch, head, qy, qx, height, width, heads)
    q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * LOG2E  # no share outside
    q_shift = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(shift + rows, q_shift, mask=q_inside)
    chosen = (batch * regions + region) * topk
    to = (((batch * heads + head) * regions + region) * tiles + tile) * topk * tokens

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for first in range(0, topk * tokens, BLOCK_N):
        j = first + n
        seen = j < topk * tokens
        number = tl.load(routes + chosen + j // tokens, mask=seen, other=0).to(tl.int32)
        ky, kx, k_inside = position(number, j % tokens, height, width, cols, region_y, region_x)
        k_inside = k_inside & seen
        k = load(token_pointers(key, k_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
        v = load(token_pointers(value, v_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        d_shares = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if SOFT:
            weight = tl.load(weights + chosen + j // tokens, mask=seen, other=0.0)
            logits = products * weight[None, :] * LOG2E - q_lse[:, None]
            shares = tl.exp2(tl.where(seen[None, :], logits, float("-inf")))
            d_logits = shares * (d_shares * weight[None, :] - q_shift[:, None])
            tl.store(d_weights + to + j, tl.sum(d_logits * products + shares * d_shares, 0), mask=seen)
            d_logits *= weight[None, :]
        else:
            shares = tl.exp2(tl.where(seen[None, :], products * LOG2E - q_lse[:, None], float("-inf")))
            d_logits = shares * (d_shares - q_shift[:, None])
        dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_pointers = token_pointers(d_query, dq_strides, batch, head, qy, qx, d)
    store(dq_pointers, dq * scale, q_inside, d, dim, EVEN_D)


@triton.jit
def key_value_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    visits,  # [batch, regions * topk]: places in `routes`, those of one region behind each other
    ends,  # [batch, regions]: where the visits of a region end; they begin where those of the one before it end
    weights,
    lse,
    d_out,
    do_strides,
    shift,
    d_key,
    dk_strides,
    d_value,
    dv_strides,
    height,
    width,
    heads,
    dim,
    regions,
    cols,
    region_y,
    region_x,
    topk,
    tiles,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SOFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Here the tile holds keys (M) and the blocks queries (N); logits are [M, N], the transpose of the forward's."""
    batch, head, region, tile = locate(tl.program_id(0), heads, tiles, regions)
    tokens = region_y * region_x
    m, n, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    ky, kx, k_inside = position(region, m, height, width, cols, region_y, region_x)
    k_inside = k_inside & (m < tokens)
    k = load(token_pointers(key, k_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
    v = load(token_pointers(value, v_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
    first_visit = tl.load(ends + batch * regions + region - 1, mask=region > 0, other=0).to(tl.int32)
    queries = (tl.load(ends + batch * regions + region).to(tl.int32) - first_visit) * tokens
    all_visits = batch * regions * topk

    dk = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for first in range(0, queries, BLOCK_N):
        j = first + n
        seen = j < queries
        visit = tl.load(visits + all_visits + first_visit + j // tokens, mask=seen, other=0).to(tl.int32)
        qy, qx, q_inside = position(visit // topk, j % tokens, height, width, cols, region_y, region_x)
        q_inside = q_inside & seen
        q = load(token_pointers(query, q_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
        do = load(token_pointers(d_out, do_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
        rows = token_rows(batch, head, qy, qx, height, width, heads)
        q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * LOG2E  # no share outside
        q_shift = tl.load(shift + rows, mask=q_inside, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        d_shares = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if SOFT:
            weight = tl.load(weights + all_visits + visit, mask=seen, other=0.0)
            shares = tl.exp2(logits * weight[None, :] - q_lse[None, :])
            d_logits = shares * (d_shares * weight[None, :] - q_shift[None, :]) * weight[None, :]
            shares *= weight[None, :]
        else:
            shares = tl.exp2(logits - q_lse[None, :])
            d_logits = shares * (d_shares - q_shift[None, :])
        dv = tl.dot(shares.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision=PRECISION)

    store(token_pointers(d_key, dk_strides, batch, head, ky, kx, d), dk * scale, k_inside, d, dim, EVEN_D)
    store(token_pointers(d_value, dv_strides, batch, head, ky, kx, d), dv, k_inside, d, dim, EVEN_D)
