"""A pure-PyTorch Llama 3 with named hook points in its residual stream; imports nothing else of this project."""
