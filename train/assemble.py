"""An SAE out of a step of its training: the latents of this process as they are, and the whole one on the first.

The SAE reads the model's own residuals: a factor on the inputs is multiplied into biases and thresholds, a scaling of
each token is written into its config. Matrices are used where they lie; where the dictionary is spread over processes,
the first one alone holds all of it, and gets it piece by piece.

Shapes: F latents (of one process or all).
"""

from dataclasses import replace

from sae.model import SAE, SAEConfig
from train.config import TrainConfig
from train.distributed import Team
from train.preprocess import PER_TOKEN, InputScale
from train.recipe import COUNTED
from train.step import SparseStep

SCALED = ("b_enc", "b_dec", "threshold", "b_mag")
"""What grows with the inputs: with these multiplied by a factor, activations and output are too."""
SENT_BYTES = 64 << 20
"""Of a matrix, sent at a time."""


def own_sae(state: SparseStep, config: TrainConfig, scale: InputScale, hook: str) -> SAE:
    """The SAE at this step; under `latents` the slice of this process, as an SAE of so many latents. Its matrices are
    those of the step: it changes with the next one."""
    whole = state.d_sae == config.latents
    described = SAEConfig(
        d_in=state.d_in,
        d_sae=state.d_sae,
        activation=config.arch,
        k=min(config.k, state.d_sae) if config.arch in COUNTED else 0,
        hook=hook,
        normalise=scale.mode if scale.mode in PER_TOKEN else "none",
        prefixes=config.prefixes if whole else (),
        prolu_plain=config.prolu_plain and config.arch == "prolu",
    )
    weights = state.final_weights()
    for name in set(SCALED) & set(weights):
        weights[name] = weights[name].double() * scale.factor
    return SAE.of(described, {name: weight.float() for name, weight in weights.items()})


def assembled(own: SAE, config: TrainConfig, team: Team) -> SAE | None:
    """The whole SAE from the slices of all processes, on the first one; None on the others."""
    if team.shards == 1:
        return own if team.rank == 0 else None
    described = replace(
        own.config,
        d_sae=config.latents,
        k=config.k if config.arch in COUNTED else 0,
        prefixes=config.prefixes,
    )
    whole = SAE(described) if team.rank == 0 else None
    for name, held in own.weights.items():
        if name == "b_dec":
            if whole:
                whole.weights[name].copy_(held)
            continue
        most = max(1, SENT_BYTES // held[:1].nbytes)
        for sender in range(team.size):
            part = team.part(config.latents, sender)
            for start in range(part.start, part.stop, most):
                stop = min(part.stop, start + most)
                into = whole.weights[name][start:stop] if whole else None
                piece = held[start - part.start : stop - part.start] if sender == team.rank else None
                team.send_first(piece, sender, into)
    return whole
