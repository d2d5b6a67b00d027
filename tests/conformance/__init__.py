"""Conformance of anybody's layer: `pytest --impl module:callable [--causal]`. See docs/check-your-own.md.

`properties` and `causal` (of a strictly causal layer) say what must hold, each in a configuration where other known
defects can't show; `examine` looks for the smallest example that breaks one; `report` tells; `plugin` is the option of
pytest; `test_faults` shows that every property can fail.
"""
