"""The Llama 3 transformer, with its hook points written out in the block.

Arithmetic follows transformers step by step (norms and RoPE rounded to the model's dtype at the same places), so a bf16
model differs from it only by the order of sums. Query, key and value weights lie in one matrix, as do gate and up: at
one token a small model is bound by the number of operations. `Reading` holds what all blocks share in one forward pass.
Suffixes: B rows, T new tokens, S cache slots, D d_model, H heads, N head dim, V vocabulary.
Papers: Llama 3 (2407.21783), RMSNorm (1910.07467), RoPE (2104.09864), grouped queries (2305.13245), SwiGLU
(2002.05202).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_3.cache import KVCache, LayerCache, Slots
from llama_3.config import ModelConfig
from llama_3.hooks import SITES, HookPoint, Hooks, Span
from llama_3.linear import Linear, project


class RMSNorm(nn.Module):
    """x over its root mean square, rounded to x's dtype, then times the weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.shape, self.eps = (d_model,), eps

    def forward(self, x: Tensor) -> Tensor:
        # Not rms_norm's own weight: it multiplies before rounding, which in bf16 moves a quarter of the numbers.
        return F.rms_norm(x, self.shape, None, self.eps) * self.weight


class Rope:
    """Cosines and signed sines of rotary positions, made in float32 and kept per dtype and device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def frequencies(self) -> Tensor:
        """float32 (N/2,): radians per position of each pair, with Llama 3.1's scaling where the config has one."""
        config, scaling = self.config, self.config.rope_scaling
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_factors is not None:
            return frequencies / torch.tensor(config.rope_factors)
        if scaling is None:
            return frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_context / (2 * math.pi / frequencies)
        smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        slowed = torch.where(turns < low, frequencies / scaling.factor, blended)
        return torch.where(turns > high, frequencies, slowed)

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of at least `length` positions, each (positions, N), in the dtype and on the device of `like`."""
        key = (like.dtype, like.device)
        if key not in self._tables or len(self._tables[key][0]) < length:
            size = max(256, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):
                angles = torch.outer(torch.arange(size).float(), self.frequencies())
                cos, sin = angles.cos(), angles.sin()
                # The first half of a rotated head is x1 cos - x2 sin: its sign is stored in the table.
                tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
                self._tables[key] = tables[0].to(like.device, like.dtype), tables[1].to(like.device, like.dtype)
        return self._tables[key]


def rotate(x_BTHN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned to its positions: halves (i, i + N/2) are the pairs, as in Hugging Face weights."""
    return x_BTHN * cos + x_BTHN.roll(x_BTHN.shape[-1] // 2, -1) * sin


@dataclass(frozen=True)
class Reading:
    """What every block needs to know about one forward pass."""

    cos: Tensor
    """(T, 1, N), or (B, T, 1, N) when rows stand at different lengths."""
    sin: Tensor
    mask: Tensor | None
    """Added to attention scores, (G*T, S) or (B, 1, G*T, S) for the G query heads of a group one after another; None
    when nothing is hidden or `causal` says it all."""
    causal: bool
    """More than one token, none read before: a token sees those before it, and the fresh keys are all keys."""
    where: Slots
    """Where new keys and values go."""
    end: int
    """Slots that some row uses once the new tokens are stored."""


def plan_reading(
    rope: Rope, starts: Sequence[int], counts: Sequence[int], tokens: int, like: Tensor, capacity: int | None
) -> Reading:
    """The `Reading` of `tokens` columns of right-padded rows that start at `starts` and hold `counts` real tokens."""
    device, start = like.device, starts[0]
    group = rope.config.n_heads // rope.config.n_kv_heads
    end = max(starts) + tokens
    if all(other == start for other in starts) and (capacity is None or end <= capacity):
        cos, sin = rope.tables(end, like)
        mask = None
        if tokens > 1 and start > 0:
            hidden = torch.ones(tokens, end, dtype=torch.bool, device=device).triu(start + 1)
            mask = torch.zeros(tokens, end, dtype=like.dtype, device=device).masked_fill_(hidden, -torch.inf)
            mask = mask.repeat(group, 1)
        return Reading(
            cos[start:end, None], sin[start:end, None], mask, tokens > 1 and start == 0, slice(start, end), end
        )
    assert capacity is not None, "rows differ in length only with a cache"
    cos, sin = rope.tables(end, like)
    # Which slots are written is worked out on the host: asking the device for indices would wait for it.
    row, token = (torch.arange(tokens) < torch.tensor(counts)[:, None]).nonzero(as_tuple=True)
    slot = torch.tensor(starts)[row] + token
    positions_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)
    end = min(end, capacity)
    hidden = torch.arange(end, device=device) > positions_BT[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=device).masked_fill_(hidden, -torch.inf)
    mask = mask.repeat(1, 1, group if tokens > 1 else 1, 1)
    where = (row.to(device), slot.to(device), token.to(device))
    return Reading(cos[positions_BT][:, :, None], sin[positions_BT][:, :, None], mask, False, where, end)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key-value head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.z = HookPoint(layer, "attn_z")
        self.qkv = Linear(config.d_model, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.out = Linear(config.n_heads * config.head_dim, config.d_model)

    def forward(self, x_BTD: Tensor, reading: Reading, cache: LayerCache | None, tap: "Tap | None" = None) -> Tensor:
        B, T, _ = x_BTD.shape
        H, K, N = self.n_heads, self.n_kv_heads, self.head_dim
        qkv_BTHN = self.qkv(x_BTD).view(B, T, H + 2 * K, N)
        qk_BTHN = rotate(qkv_BTHN[:, :, : H + K], reading.cos, reading.sin)
        k, v = qk_BTHN[:, :, H:].transpose(1, 2), qkv_BTHN[:, :, H + K :].transpose(1, 2)
        if cache is not None:
            cache.write(k, v, reading.where)
            if not reading.causal:
                k, v = cache.keys[:, :, : reading.end], cache.values[:, :, : reading.end]
        q = qk_BTHN[:, :, :H].transpose(1, 2)
        if reading.causal:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K != H)
        else:
            # The heads of a group stand as more queries of their key head: no head is repeated, and unlike `enable_gqa`
            # this leaves a card's fused kernels a choice when there is a mask.
            q = q.reshape(B, K, H // K * T, N)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=reading.mask).view(B, H, T, N)
        mixed = mixed.transpose(1, 2).reshape(B, T, H * N)
        if tap is not None:
            mixed = tap(self.z, mixed)
        attended: Tensor = self.out(mixed)
        return attended


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)`, gate above up in one weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, -1)
        mixed: Tensor = self.down(F.silu(gate) * up)
        return mixed


class _Reached(Exception):  # noqa: N818 (a way out, not an error)
    """Carries the tensor at `stop_after` out of the block that holds it."""

    def __init__(self, x_BTD: Tensor) -> None:
        self.x_BTD = x_BTD


@dataclass(frozen=True)
class Tap:
    """What a block calls at each of its points: the cache that keeps it, the hooks, the way out at `stop_after`."""

    hooks: Hooks | None
    span: Span | None
    stop_after: HookPoint | None
    cache: KVCache | None
    where: Slots

    def __call__(self, point: HookPoint, x_BTD: Tensor) -> Tensor:
        if self.cache is not None and point == self.cache.kept_at:
            self.cache.write_kept(x_BTD, self.where)
        if self.hooks is not None and self.span is not None:
            x_BTD = self.hooks(point, x_BTD, self.span)
        if point == self.stop_after:
            raise _Reached(x_BTD)
        return x_BTD


class Block(nn.Module):
    """One layer: attention and feed-forward, each reading a normed residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.points = tuple(HookPoint(layer, site) for site in SITES)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, reading: Reading, cache: LayerCache | None, tap: Tap | None) -> Tensor:
        if tap is None:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), reading, cache)
            x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
            return x_BTD
        resid_pre, attn_norm, _, attn_out, resid_mid, mlp_norm, mlp_out, resid_post = self.points
        x_BTD = tap(resid_pre, x_BTD)
        normed_BTD = tap(attn_norm, self.attention_norm(x_BTD))
        x_BTD = x_BTD + tap(attn_out, self.attention(normed_BTD, reading, cache, tap))
        x_BTD = tap(resid_mid, x_BTD)
        normed_BTD = tap(mlp_norm, self.feed_forward_norm(x_BTD))
        x_BTD = x_BTD + tap(mlp_out, self.feed_forward(normed_BTD))
        return tap(resid_post, x_BTD)


class Transformer(nn.Module):
    """A Llama 3. Made with random weights; `llama_3.checkpoint.load_model` fills it from a folder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size)
        self.rope = Rope(config)
        self._compiled = False
        if not self.embedding_VD.is_meta:
            self.initialise()

    def initialise(self, std: float = 0.02) -> None:
        """Draw every matrix from a normal distribution, the two that write to the residual stream narrower by depth."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(weight, std=std / math.sqrt(2 * self.config.n_layers) if writes else std)

    def compile_blocks(self) -> None:
        """Let torch compile the step that reads one token a row. Blocks with hooks, and prompts, run as written."""
        for block in self.blocks:
            block.compile(dynamic=True)
        self._compiled = True

    @property
    def unembedding_VD(self) -> Tensor:
        """The weight that turns a normed residual into logits: the embedding itself when tied."""
        return self.embedding_VD if self.config.tied or self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and residual stream."""
        return self.embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding_VD.device

    def unembed(self, resid_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of a residual after the last block: final norm, then the head."""
        normed_BTD = self.norm(resid_BTD)
        logits: Tensor = project(normed_BTD, self.embedding_VD) if self.head is None else self.head(normed_BTD)
        return logits

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty `KVCache` in this model's dtype and on its device."""
        return KVCache(self.config, rows, capacity, self.dtype, self.device)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        lengths_B: Sequence[int] | Tensor | None = None,
        cache: KVCache | None = None,
        hooks: Hooks | None = None,
        span: Span | None = None,
        stop_after: HookPoint | None = None,
        last_only: bool = False,
        rerun: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) in the model's dtype; (B, 1, V) at each row's last real token with `last_only`.

        Rows are right-padded, `lengths_B` holds their real lengths. With a cache the tokens continue each row where it
        stands, and are remembered. `span` is what hooks are told; without one, the tokens count as prompt. With
        `stop_after` nothing beyond that point runs and its tensor (B, T, D) is returned as the hooks there left it.
        With `rerun` the tokens are some that the cache has read before and that were truncated since: they enter with
        the residual it keeps, and only the layers above run. ValueError when a hook point lies beyond the last block,
        or when a row outgrows the cache.
        """
        B, T = tokens_BT.shape
        counts = [T] * B if lengths_B is None else [int(count) for count in lengths_B]
        starts = [0] * B if cache is None else list(cache.lengths)
        assert len(counts) == len(starts) == B and max(counts) <= T
        if cache is not None:
            longest = max(map(int.__add__, starts, counts))
            if longest > cache.capacity:
                raise ValueError(f"{longest} tokens do not fit a cache with room for {cache.capacity}")
        hooked = hooks.layers if hooks is not None else frozenset()
        kept_at = cache.kept_at if cache is not None else None
        tapped = hooked.union(point.layer for point in (stop_after, kept_at) if point is not None)
        if tapped and max(tapped) >= self.config.n_layers:
            raise ValueError(f"there is no block {max(tapped)} in a model of {self.config.n_layers} blocks (0-based)")
        if hooked and span is None:
            span = plan_span(tokens_BT, starts, counts)
        first = 0
        if rerun:
            assert cache is not None and kept_at is not None
            resid_BTD = cache.read_kept(T)
            first = kept_at.layer + (kept_at.site == "resid_post")
        else:
            resid_BTD = F.embedding(tokens_BT, self.embedding_VD)
        reading = plan_reading(self.rope, starts, counts, T, resid_BTD, cache.capacity if cache else None)
        tap = Tap(hooks, span, stop_after, cache, reading.where) if tapped else None
        try:
            if rerun and tap is not None and kept_at is not None and kept_at.layer < first:
                resid_BTD = tap(kept_at, resid_BTD)
            for layer, block in islice(enumerate(self.blocks), first, None):
                own_tap = tap if layer in tapped else None
                run = block.forward if self._compiled and (T > 1 or own_tap is not None) else block
                resid_BTD = run(resid_BTD, reading, cache.layers[layer] if cache is not None else None, own_tap)
        except _Reached as reached:
            return reached.x_BTD
        if cache is not None:
            cache.advance(counts)
        if last_only and T > 1:
            last_B = torch.tensor(counts, device=self.device) - 1
            resid_BTD = resid_BTD[torch.arange(B, device=self.device), last_B][:, None]
        return self.unembed(resid_BTD)


def plan_span(
    tokens_BT: Tensor,
    starts: Sequence[int],
    counts: Sequence[int],
    rows: Sequence[int] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Span:
    """The `Span` of right-padded rows that start at `starts`; by default all that is read so far is prompt."""
    B, T = tokens_BT.shape
    device = tokens_BT.device
    start_B, count_B = torch.tensor(starts, device=device), torch.tensor(counts, device=device)
    steps_T = torch.arange(T, device=device)
    positions_BT = torch.where(steps_T < count_B[:, None], start_B[:, None] + steps_T, -1)
    lengths_B = start_B + count_B if prompt_lengths is None else torch.tensor(prompt_lengths, device=device)
    return Span(positions_BT, tokens_BT, tuple(range(B)) if rows is None else tuple(rows), lengths_B)
