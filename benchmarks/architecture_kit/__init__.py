"""Small versions of transformers' architectures, inputs for them, and the comparison with plain PyTorch."""
