"""Sparse autoencoders: the module, its files on disk, its losses and the CPU kernels that train it. Knows no model."""
