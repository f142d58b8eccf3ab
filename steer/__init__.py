"""steer: watch and steer what a Llama 3 model is thinking while you talk to it.

`steer.load(model, sae)` gives an `Engine`. It is imported on first use, so `import steer` stays without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.engine import Engine

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(model: str | None = None, sae: str | None = None, labels: str | None = None, **options: Any) -> Engine:
    """An `Engine` for a model folder, an SAE folder and a label index; without arguments, the shipped demo.

    `options` are those of `steer.engine.Engine.load`: `device`, `dtype`.
    """
    from steer.engine import Engine

    return Engine.load(model, sae, labels, **options)
