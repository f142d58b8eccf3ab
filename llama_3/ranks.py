"""How many processes torchrun started to share a model, and which of them this is; free of torch."""

import os


def world() -> int:
    """How many processes share the model: torchrun's number, 1 without it. Variables of others' making do not count."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_main() -> bool:
    """Whether this is the one process, or the first of several, which reads and speaks for all."""
    return world() == 1 or os.environ["RANK"] == "0"
