"""From text to a measured SAE: capture of activations, training, evaluation. Uses `llama_3` and `sae`."""
