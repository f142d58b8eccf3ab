"""Places in and around the residual stream, and callables attached to them.

A hook is any `(x_BTD, span) -> x_BTD`; returning the same object means "unchanged". Hooks at one point run in the
order they were added, each seeing what the one before returned. Nothing here knows what a hook does.
Suffixes: B rows, T tokens, D d_model.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from llama_3.config import ModelConfig
from llama_3.errors import explained

SITES = ("resid_pre", "attn_norm", "attn_z", "attn_out", "resid_mid", "mlp_norm", "mlp_out", "resid_post")
"""In the order in which a block passes them. `attn_norm` and `mlp_norm` are what attention and feed-forward read: the
norm's output, its weight multiplied in. `attn_z` is the heads' outputs side by side, before the output projection."""

_SPELLINGS: tuple[tuple[str, str | None], ...] = (
    (rf"blocks\.(?P<layer>\d+)\.hook_(?P<site>{'|'.join(SITES)})", None),  # ours
    (r"blocks\.(?P<layer>\d+)\.attn\.hook_z", "attn_z"),  # TransformerLens
    (r"(?:model\.)?layers\.(?P<layer>\d+)(?:\.output)?", "resid_post"),  # Hugging Face modules, sparsify
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.mlp", "mlp_out"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.self_attn(?:\.o_proj)?", "attn_out"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.input_layernorm", "attn_norm"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.post_attention_layernorm", "mlp_norm"),
    (r"layer_(?P<layer>\d+)", "resid_pre"),  # old sparsify: the block's input
    (r"(?:resid_post_layer_|resid_post\.layer_)(?P<layer>\d+)", "resid_post"),  # dictionary_learning
    (r"L(?P<layer>\d+)R", "resid_post"),  # Llama Scope
    (r"L(?P<layer>\d+)A", "attn_out"),
    (r"L(?P<layer>\d+)M", "mlp_out"),
    (r".*-SAE-l(?P<layer>\d+)", "resid_post"),  # Goodfire
    (r"(?P<layer>\d+)-.*res.*", "resid_post"),  # Neuronpedia sources
    (r"(?P<layer>\d+)-.*att.*", "attn_out"),
    (r"(?P<layer>\d+)-.*mlp.*", "mlp_out"),
)


@dataclass(frozen=True)
class HookPoint:
    """A named place: one of `SITES` in block `layer` (0-based). Prints as `blocks.19.hook_resid_post`."""

    layer: int
    site: str

    def __post_init__(self) -> None:
        if self.layer < 0 or self.site not in SITES:
            raise _point_error(f"layer {self.layer}, site {self.site!r}")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """The point that `text` names, in our spelling or that of a known SAE library; ValueError otherwise."""
        if text.strip() in ("embed_tokens", "model.embed_tokens"):
            return cls(0, "resid_pre")
        for pattern, site in _SPELLINGS:
            if match := re.fullmatch(pattern, text.strip()):
                return cls(int(match["layer"]), site or match["site"])
        raise _point_error(repr(text))

    @property
    def depth(self) -> tuple[int, int]:
        """Sorts points in the order in which a forward pass meets them."""
        return self.layer, SITES.index(self.site)

    @property
    def entry(self) -> "HookPoint":
        """The last point between two blocks at or before this one: from there all that it can change is run again."""
        return self if self.site == "resid_post" else HookPoint(self.layer, "resid_pre")

    def width(self, config: ModelConfig) -> int:
        """Length of the vectors at this point."""
        return config.n_heads * config.head_dim if self.site == "attn_z" else config.d_model


def _point_error(what: str) -> ValueError:
    hint = f"write blocks.LAYER.hook_SITE with SITE one of {', '.join(SITES)}"
    return explained(ValueError, f"{what} is not a hook point", hint)


@dataclass(frozen=True)
class Span:
    """Which rows and positions a forward pass works on; hooks need nothing else."""

    positions_BT: Tensor
    """int64, absolute position of each token in its row; -1 is padding."""
    tokens_BT: Tensor
    """int64, the token ids fed; arbitrary where the position is -1."""
    rows: tuple[int, ...]
    """The logical row of each batch row: finished rows leave the batch, the others keep their numbers."""
    prompt_lengths_B: Tensor
    """int64, tokens of the prompt of each batch row."""

    @cached_property
    def generated_BT(self) -> Tensor:
        """bool: positions from the last prompt token on, whose outputs pick the reply; False on padding."""
        return (self.positions_BT >= 0) & (self.positions_BT >= self.prompt_lengths_B[:, None] - 1)

    def head(self, rows: int) -> "Span":
        """The span of the first rows alone."""
        return Span(self.positions_BT[:rows], self.tokens_BT[:rows], self.rows[:rows], self.prompt_lengths_B[:rows])


Hook = Callable[[Tensor, Span], Tensor]


class Hooks:
    """Callables by hook point. An empty one costs nothing: blocks of layers without hooks never look at it."""

    def __init__(self) -> None:
        self._hooks: dict[HookPoint, list[Hook]] = {}
        self.layers: frozenset[int] = frozenset()
        """Layers at which something is attached."""

    def add(self, point: HookPoint, hook: Hook) -> None:
        """Attach `hook` after those already at `point`."""
        self._hooks.setdefault(point, []).append(hook)
        self._refresh()

    def remove(self, point: HookPoint, hook: Hook) -> None:
        """Detach `hook` from `point`; ValueError when it is not there."""
        attached = self._hooks.get(point, [])
        if hook not in attached:
            raise ValueError(f"that hook is not attached at {point}")
        attached.remove(hook)
        if not attached:
            del self._hooks[point]
        self._refresh()

    def _refresh(self) -> None:
        self.layers = frozenset(point.layer for point in self._hooks)

    def points(self) -> tuple[HookPoint, ...]:
        """Points with hooks, in the order in which a forward pass meets them."""
        return tuple(sorted(self._hooks, key=lambda point: point.depth))

    def __iter__(self) -> Iterator[HookPoint]:
        return iter(self.points())

    def __len__(self) -> int:
        return len(self._hooks)

    def __call__(self, point: HookPoint, x_BTD: Tensor, span: Span) -> Tensor:
        """`x_BTD` after every hook at `point`; the same object when there is none."""
        for hook in self._hooks.get(point, ()):
            shape = x_BTD.shape
            x_BTD = hook(x_BTD, span)
            assert x_BTD.shape == shape, f"the hook at {point} turned {tuple(shape)} into {tuple(x_BTD.shape)}"
        return x_BTD
