"""A proof by training: nobody can predict noise.

Models of the causal layer, as `reference` defines it and as `optimized` computes it, and of two that leak as published
ones do, are trained to predict independent uniform tokens, new ones at every step. Whatever is learned of the past is
of no use: the loss of unseen tokens is at least ln V, but for a model that sees something of the token that it is to
predict. `python -m tests.noise --help`.
"""
