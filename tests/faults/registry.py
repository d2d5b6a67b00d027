"""Every fault, by its name."""

from tests.faults import causal, computations, layers, operators, results
from tests.faults.fault import FAULTS

__all__ = ["FAULTS", "causal", "computations", "layers", "operators", "results"]
