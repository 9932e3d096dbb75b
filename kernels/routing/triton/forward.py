"""Fused forward pass: one program per tile of queries of a region, online softmax along the regions that it chose."""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import LN2, LOG2E, load, store
from zoo.kernels.routing.triton.common import locate, position, token_pointers, token_rows


@triton.jit
def forward_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    routes,  # [batch, regions, topk], contiguous
    weights,  # of the shape of `routes`, contiguous
    out,
    o_strides,
    lse,  # [batch, height, width, heads], contiguous
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
    chosen = (batch * regions + region) * topk

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(0, topk * tokens, BLOCK_N):
        j = first + n
        seen = j < topk * tokens
        number = tl.load(routes + chosen + j // tokens, mask=seen, other=0).to(tl.int32)
        ky, kx, k_inside = position(number, j % tokens, height, width, cols, region_y, region_x)
        k_inside = k_inside & seen  # filling is a zero key, which is seen
        k = load(token_pointers(key, k_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
        v = load(token_pointers(value, v_strides, batch, head, ky, kx, d), k_inside, d, dim, EVEN_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if SOFT:
            weight = tl.load(weights + chosen + j // tokens, mask=seen, other=0.0)
            logits *= weight[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shares = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(shares, 1)
        if SOFT:
            shares *= weight[None, :]
        acc = tl.dot(shares.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    o_pointers = token_pointers(out, o_strides, batch, head, qy, qx, d)
    store(o_pointers, acc / total[:, None], q_inside, d, dim, EVEN_D)
    rows = token_rows(batch, head, qy, qx, height, width, heads)
    tl.store(lse + rows, top * LN2 + tl.log(total), mask=q_inside)
