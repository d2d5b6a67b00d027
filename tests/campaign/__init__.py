"""A long run over independently drawn configurations, a million and more, that goes on where it was stopped.

    python -m tests.campaign --cases 100000                                      # on this machine, every kind
    python -m tests.campaign --kind solver --case 123456 --seed 0                # one case again
    pytest -m nightly --max-examples 100000 tests/campaign                       # the same from pytest

A case is one configuration with its data, a function of (seed, kind, index) alone; its rows and elements don't count.
Kinds: `selection` and `solver` (drawn by NumPy, compared in batches), `layer` and `causal` (properties of the suite
that hypothesis draws, in chunks).
"""
