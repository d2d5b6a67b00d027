"""Every fault, by its name."""

from tests.faults import computations, layers, operators, results
from tests.faults.fault import FAULTS

__all__ = ["FAULTS", "computations", "layers", "operators", "results"]
