"""Whole recipes by name, as data: what differs from the defaults of `TrainConfig`, and where the numbers come from.

`openai` is Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A: inputs centred to length 1,
`b_dec` from the geometric median, a constant rate by the law 2e-4 / sqrt(n / 2^14), gradients clipped at 1, an EMA of
the weights. `llama3-interpretability-sae` is the published configuration of the project of that name (Paul Pauls, 2024)
for Llama 3.2 3B: inputs layer-normed, a latent dead after 80,000 steps of 8,192 tokens, the data read ten times, AdamW
with the usual weight decay of 0.01.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"expansion": 8, "k": 24, "tokens": 700_000, "stats_rows": 100_000, "checkpoint_every": 200},
    "openai": {
        "latents": 32_768,
        "k": 32,
        "batch": 131_072,
        "accumulate": 16,
        "lr_boost": 1.0,
        "decay_share": 0.0,
        "scale": "unit_norm",
        "center": "median",
        "revival": "auxk",
        "k_aux": 512,
        "aux_coefficient": 1 / 32,
        "dead_after": 10_000_000,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 6.25e-10,
        "clip": 1.0,
        "ema": 0.999,
    },
    "llama3-interpretability-sae": {
        "latents": 65_536,
        "k": 64,
        "batch": 8192,
        "epochs": 10,
        "held_out": 0.05,
        "lr": 5e-5,
        "warmup": 0.0,
        "decay": "cosine",
        "decay_share": 1.0,
        "final_lr": 0.2,
        "scale": "layer_norm",
        "revival": "auxk",
        "k_aux": 2048,
        "aux_coefficient": 1 / 32,
        "dead_after": 80_000 * 8192,
        "beta1": 0.85,
        "beta2": 0.9999,
        "eps": 6.25e-10,
        "weight_decay": 0.01,
        "early_stop": 0,
    },
}

DESCRIPTIONS = {
    "default": "ours: TopK, k 32, 16 times as wide as the model, AuxK, 4 M tokens",
    "quick": "ours, half as wide and 700,000 tokens: minutes on a laptop; the same as --quick",
    "openai": "Gao et al. 2024, appendix A: n 32,768, k 32, steps of 131,072, EMA, inputs of unit norm",
    "llama3-interpretability-sae": "n 65,536, k 64, k_aux 2,048, cosine from 5e-5 to a fifth, 10 epochs, 5% held out",
}
