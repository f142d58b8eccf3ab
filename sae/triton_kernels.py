"""The sparse algebra of an SAE on CUDA, in Triton: what `sae/kernels.py` does on a CPU, with the same arguments.

Imported only where tensors lie on a GPU, which is where Triton is installed. All tensors of a call lie on the current
device, rows contiguous. Sums are taken in float32 and in a fixed order, without atomics: a call repeated gives the same
bits. Addresses are 64-bit, so a weight matrix may have more than 2^31 entries.

`encode_topk` is the one with an idea. The k largest pre-activations lie in the k groups (of `GROUP` neighbouring
latents) with the largest maxima. So a bfloat16 product writes the maxima only, `torch.topk` picks k + margin groups,
and only their members are computed again, in float32, to be ranked. In bytes, for B = 4,096, F = 131,072, D = 4,096,
k = 64:

    all pre-activations in bfloat16, written and read again    2 * 1,074 MB
    maxima in float32, written and read again                  2 *   134 MB
    scores of the chosen groups in float32                     2 *    19 MB
    W_enc in float32 for these, at most once from memory           2,147 MB
    inputs of the chosen pairs, 16 KB each                         4,832 MB, from L2 (all inputs are 67 MB)

The last two are why the chosen (token, group) pairs are sorted by group: up to `PAIRS` tokens share the rows that a
program loads. With a program per pair, W_enc would be read up to `PAIRS` times more often. Smaller groups make the last
three lines smaller and the second larger. These are counts, not measurements.

Shapes: B tokens, D width of the residual stream, F latents, K kept latents, G groups, C chosen groups, M members of the
chosen groups, P (token, latent) pairs, R a range of latents.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[[Callable[..., None]], Any] = triton.jit  # typed here, since mypy runs without Triton

GROUP = 16
"""Neighbouring latents that share a maximum; a power of two."""

PAIRS = 32
"""Tokens of a tile that scores one group."""


# -- encoder and top-k ------------------------------------------------------------------------------------------------


@_jit
def _maxima_kernel(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    B: tl.tensor,
    F: tl.tensor,
    D: tl.tensor,
    G: tl.tensor,
    TOKENS: tl.constexpr,
    LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PANEL: tl.constexpr,
) -> None:
    """Maxima of `w x + bias` over groups of latents, (B, G), a tile (TOKENS, LATENTS) per program.

    Neighbouring programs go down a panel of PANEL token blocks before they move on to other latents, so that the inputs
    of a panel stay in L2 and weights are read from memory once a panel.
    """
    token_blocks, latent_blocks = tl.cdiv(B, TOKENS), tl.cdiv(F, LATENTS)
    program = tl.program_id(0)
    panel = program // (PANEL * latent_blocks)
    height = tl.minimum(token_blocks - panel * PANEL, PANEL)
    inside = program % (PANEL * latent_blocks)
    tokens = (panel * PANEL + inside % height) * TOKENS + tl.arange(0, TOKENS)
    latents = (inside // height) * LATENTS + tl.arange(0, LATENTS)
    columns = tl.arange(0, BLOCK_D)
    # Rows past the end are read again from the last one, and their results dropped: no mask in the inner loop.
    x_tile = x + tl.minimum(tokens, B - 1).to(tl.int64)[:, None] * D + columns[None, :]
    w_tile = w + tl.minimum(latents, F - 1).to(tl.int64)[None, :] * D + columns[:, None]
    pre = tl.zeros([TOKENS, LATENTS], tl.float32)
    for start in range(0, D, BLOCK_D):
        left = columns < D - start
        x_part = tl.load(x_tile + start, mask=left[None, :], other=0.0)
        w_part = tl.load(w_tile + start, mask=left[:, None], other=0.0)
        pre = tl.dot(x_part, w_part, pre)
    pre += tl.load(bias + latents, mask=latents < F, other=float("-inf"))[None, :]
    maxima = tl.max(tl.reshape(pre, [TOKENS, LATENTS // GROUP, GROUP]), 2)
    groups = (inside // height) * (LATENTS // GROUP) + tl.arange(0, LATENTS // GROUP)
    inside_out = (tokens < B)[:, None] & (groups < G)[None, :]
    tl.store(out + tokens.to(tl.int64)[:, None] * G + groups[None, :], maxima, mask=inside_out)


@_jit
def _score_kernel(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    group_of: tl.tensor,
    low_of: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor,
    out: tl.tensor,
    F: tl.tensor,
    D: tl.tensor,
    G: tl.tensor,
    C: tl.tensor,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Float32 pre-activations of one group's members for up to PAIRS tokens that chose it, into (B, C, GROUP).

    The tile's pairs begin at `low_of` among those sorted by group; `order` says where each was before.
    """
    group = tl.load(group_of + tl.program_id(0))
    if group < G:
        pairs = tl.load(low_of + tl.program_id(0)) + tl.arange(0, PAIRS)
        real = pairs < tl.load(starts + group + 1)
        place = tl.load(order + pairs, mask=real, other=0)
        latents = group * GROUP + tl.arange(0, GROUP)
        columns = tl.arange(0, BLOCK_D)
        x_tile = x + (place // C)[:, None] * D + columns[None, :]
        w_tile = w + tl.minimum(latents, F - 1)[None, :] * D + columns[:, None]
        pre = tl.zeros([PAIRS, GROUP], tl.float32)
        for start in range(0, D, BLOCK_D):
            left = columns < D - start
            x_part = tl.load(x_tile + start, mask=left[None, :], other=0.0)
            w_part = tl.load(w_tile + start, mask=left[:, None], other=0.0)
            pre = tl.dot(x_part, w_part, pre, input_precision="ieee")
        pre += tl.load(bias + latents, mask=latents < F, other=float("-inf"))[None, :]
        tl.store(out + place[:, None] * GROUP + tl.arange(0, GROUP)[None, :], pre, mask=real[:, None])


def group_maxima(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """Largest `W_enc x + b_enc` of each group of `GROUP` neighbouring latents, (B, G) float32; the last group may have
    fewer members. The product is taken in the dtype that x and W_enc share."""
    (tokens, width), latents = x_BD.shape, len(b_enc_F)
    assert x_BD.dtype == W_enc_FD.dtype and x_BD.is_contiguous() and W_enc_FD.is_contiguous()
    maxima_BG = torch.empty(tokens, triton.cdiv(latents, GROUP), device=x_BD.device)
    grid = (triton.cdiv(tokens, 128) * triton.cdiv(latents, 256),)
    _maxima_kernel[grid](
        x_BD,
        W_enc_FD,
        b_enc_F,
        maxima_BG,
        tokens,
        latents,
        width,
        maxima_BG.shape[1],
        TOKENS=128,
        LATENTS=256,
        BLOCK_D=128 // x_BD.element_size(),
        GROUP=GROUP,
        PANEL=32,
        num_warps=8,
        num_stages=3,  # 144 KB of shared memory on Hopper and data-centre Blackwell, 96 KB on cards that have 99
    )
    return maxima_BG


def score_groups(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, chosen_BC: Tensor) -> Tensor:
    """Float32 pre-activations of all members of each token's chosen groups, (B, C, GROUP); -inf for members past F."""
    latents, width = W_enc_FD.shape
    assert x_BD.is_contiguous() and W_enc_FD.is_contiguous()
    groups, pairs, device = triton.cdiv(latents, GROUP), chosen_BC.numel(), x_BD.device
    sorted_P, order_P = chosen_BC.reshape(-1).sort()
    # Groups become tiles of at most PAIRS pairs. Their number is known only on the device, a bound on it here as well:
    # programs past the last tile find the group `groups` and leave, and nothing waits for the host.
    starts_G1 = torch.searchsorted(sorted_P, torch.arange(groups + 1, device=device))
    ends_G = (starts_G1.diff() + (PAIRS - 1)).div_(PAIRS, rounding_mode="floor").cumsum(0)
    tile_T = torch.arange(min(pairs, groups + pairs // PAIRS), device=device)
    group_T = torch.searchsorted(ends_G, tile_T, right=True)
    known_T = group_T.clamp(max=groups - 1)
    tiles_before_T = torch.nn.functional.pad(ends_G, (1, 0))[known_T]
    low_T = starts_G1[known_T] + (tile_T - tiles_before_T) * PAIRS
    scores_BCM = torch.empty(*chosen_BC.shape, GROUP, device=device)
    _score_kernel[(len(tile_T),)](
        x_BD,
        W_enc_FD,
        b_enc_F,
        group_T,
        low_T,
        starts_G1,
        order_P,
        scores_BCM,
        latents,
        width,
        groups,
        chosen_BC.shape[1],
        PAIRS=PAIRS,
        GROUP=GROUP,
        BLOCK_D=32,
        num_warps=2,
    )
    return scores_BCM


def encode_topk(
    x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, *, screen_FD: Tensor | None = None, margin: int = 8
) -> tuple[Tensor, Tensor]:
    """(indices int64, values float32), each (B, k), unordered: the largest `W_enc x + b_enc`, possibly negative.

    Values are those of float32, and so is the set kept, unless bfloat16 errs by more than the distance between the k-th
    group and the one `margin` groups later. `screen_FD` is a bfloat16 copy of W_enc that the caller keeps up to date
    (`adam_rows_` writes it in passing); without one it is made anew: F * D * 6 bytes moved.
    """
    assert k <= len(b_enc_F), f"{k} of {len(b_enc_F)} latents"
    screen_FD = W_enc_FD.bfloat16() if screen_FD is None else screen_FD
    maxima_BG = group_maxima(x_BD.to(screen_FD.dtype), screen_FD, b_enc_F)
    chosen_BC = maxima_BG.topk(min(k + margin, maxima_BG.shape[1]), sorted=False).indices
    scores_BM = score_groups(x_BD, W_enc_FD, b_enc_F, chosen_BC).flatten(1)
    values_BK, kept_BK = scores_BM.topk(k, sorted=False)
    groups_BK = chosen_BC.gather(1, kept_BK.div(GROUP, rounding_mode="floor"))
    return groups_BK * GROUP + kept_BK % GROUP, values_BK


# -- sparse products --------------------------------------------------------------------------------------------------


@_jit
def _sum_rows_kernel(
    index: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    dense: tl.tensor,
    out: tl.tensor,
    D: tl.tensor,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """out[row] (+)= sum over the row's pairs of values * dense[index]; PAIRS rows of dense are in flight at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low, high = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(low, high, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        chosen = tl.load(index + pairs, mask=pairs < high, other=0).to(tl.int64)
        value = tl.load(values + pairs, mask=pairs < high, other=0.0).to(tl.float32)
        inside = (pairs < high)[:, None] & (columns < D)[None, :]
        rows = tl.load(dense + chosen[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32) * value[:, None], 0)
    places = out + row * D + columns
    if ADD:
        total += tl.load(places, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(places, total, mask=columns < D)


@_jit
def _dot_pairs_kernel(
    x: tl.tensor,
    w: tl.tensor,
    latent_of: tl.tensor,
    row_of: tl.tensor,
    out: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """out[p] = x[row_of[p]] . w[latent_of[p]] for PAIRS pairs."""
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(row_of + pairs, mask=pairs < P, other=0).to(tl.int64)
    latent = tl.load(latent_of + pairs, mask=pairs < P, other=0).to(tl.int64)
    total = tl.zeros([PAIRS, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (pairs < P)[:, None] & (columns < D)[None, :]
        x_part = tl.load(x + row[:, None] * D + columns[None, :], mask=inside, other=0.0)
        w_part = tl.load(w + latent[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += x_part.to(tl.float32) * w_part.to(tl.float32)
    tl.store(out + pairs, tl.sum(total, 1), mask=pairs < P)


def _sum_rows(
    index_P: Tensor, values_P: Tensor, starts_R1: Tensor, dense_ND: Tensor, out_RD: Tensor, add: bool
) -> None:
    assert dense_ND.is_contiguous() and out_RD.is_contiguous() and len(starts_R1) == len(out_RD) + 1
    rows, width = out_RD.shape
    block = min(512, triton.next_power_of_2(width))
    if rows:
        _sum_rows_kernel[(rows, triton.cdiv(width, block))](
            index_P, values_P, starts_R1, dense_ND, out_RD, width, ADD=add, BLOCK_D=block, PAIRS=8
        )


def decode_sparse(indices_BK: Tensor, values_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Sum over K of `values * W_dec[indices]`, (B, D)."""
    tokens, k = indices_BK.shape
    starts_B = torch.arange(tokens, device=indices_BK.device) * k
    return decode_pairs(indices_BK.reshape(-1), values_BK.reshape(-1), starts_B, W_dec_FD)


def decode_pairs(latent_P: Tensor, values_P: Tensor, starts_B: Tensor, W_dec_FD: Tensor) -> Tensor:
    """The same for pairs sorted by token, the first of each token at `starts_B`; 0 for a token without one."""
    starts_B1 = torch.nn.functional.pad(starts_B, (0, 1), value=len(latent_P))
    out_BD = W_dec_FD.new_empty(len(starts_B), W_dec_FD.shape[1])
    _sum_rows(latent_P, values_P, starts_B1, W_dec_FD, out_BD, add=False)
    return out_BD


def gather_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """Dot product of each row of x with the K rows of W it names, (B, K)."""
    tokens, k = indices_BK.shape
    token_P = torch.arange(tokens, device=x_BD.device).repeat_interleave(k)
    return dot_pairs(x_BD, W_FD, indices_BK.reshape(-1), token_P).view(tokens, k)


def dot_pairs(x_BD: Tensor, W_FD: Tensor, latent_P: Tensor, row_P: Tensor) -> Tensor:
    """Dot product of row `row_P` of x with row `latent_P` of W, (P,)."""
    assert x_BD.is_contiguous() and W_FD.is_contiguous()
    pairs, width = len(latent_P), x_BD.shape[1]
    dots_P = W_FD.new_empty(pairs)
    block = min(512, triton.next_power_of_2(width))
    if pairs:
        _dot_pairs_kernel[(triton.cdiv(pairs, 8),)](
            x_BD, W_FD, latent_P, row_P, dots_P, pairs, width, BLOCK_D=block, PAIRS=8
        )
    return dots_P


def add_product(
    starts_F1: Tensor, sorted_P: Tensor, dense_ND: Tensor, first: int, out_RD: Tensor, column_P: Tensor
) -> None:
    """Adds rows `first`.. of `A^T dense` to `out_RD`. The pairs are sorted by latent, those of latent f from
    `starts_F1[f]` up to `starts_F1[f + 1]`; A holds `sorted_P` in the columns `column_P` (rows of `dense`)."""
    _sum_rows(column_P, sorted_P, starts_F1[first : first + len(out_RD) + 1], dense_ND, out_RD, add=True)


# -- optimiser --------------------------------------------------------------------------------------------------------


@_jit
def _adam_kernel(
    weights: tl.tensor,
    gradient: tl.tensor,
    first_moment: tl.tensor,
    second_moment: tl.tensor,
    screen: tl.tensor,
    D: tl.tensor,
    lr: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    kept: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    PROJECT: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Projection, Adam and renormalisation of one row, which a program holds as a whole."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    places = tl.program_id(0).to(tl.int64) * D + columns
    w = tl.load(weights + places, mask=inside, other=0.0)
    g = tl.load(gradient + places, mask=inside, other=0.0)
    if PROJECT:
        g -= w * tl.sum(g * w, 0)
    m = beta1 * tl.load(first_moment + places, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(second_moment + places, mask=inside, other=0.0) + rest2 * g * g
    # Rounded as IEEE asks: Triton's own root and quotient are approximate, and memory is what a row waits for anyway.
    w = w * kept - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if UNIT_NORM:
        w = tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-12))
    tl.store(weights + places, w, mask=inside)
    tl.store(first_moment + places, m, mask=inside)
    tl.store(second_moment + places, v, mask=inside)
    if SCREEN:
        tl.store(screen + places, w.to(screen.dtype.element_ty), mask=inside)


def adam_rows_(
    weights_RD: Tensor,
    gradient_RD: Tensor,
    first_RD: Tensor,
    second_RD: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    project: bool = False,
    unit_norm: bool = False,
    screen_RD: Tensor | None = None,
) -> None:
    """One step of AdamW on rows of a weight matrix, in place: float32, one pass over memory.

    The same as, in this order, `project_gradient_` (if `project`; the gradient itself is left as it is),
    `torch._fused_adamw_` and `normalise_rows_` (if `unit_norm`). `weight_decay` is decoupled; 0 is Adam. `step` counts
    from 1 and lives on the host, since reading it from the device would wait for it. `screen_RD` gets a copy of the new
    weights in its own dtype.
    """
    rows, width = weights_RD.shape
    block = triton.next_power_of_2(width)
    assert block <= 16384, f"a row of {width} does not fit into a program's registers"
    tensors = [weights_RD, gradient_RD, first_RD, second_RD]
    assert all(t.is_contiguous() and t.dtype == torch.float32 and t.shape == weights_RD.shape for t in tensors)
    if not rows:
        return
    _adam_kernel[(rows,)](
        *tensors,
        weights_RD if screen_RD is None else screen_RD,
        width,
        lr,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** 0.5,
        PROJECT=project,
        UNIT_NORM=unit_norm,
        SCREEN=screen_RD is not None,
        BLOCK_D=block,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
    )
