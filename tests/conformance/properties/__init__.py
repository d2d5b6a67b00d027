"""What must hold of a layer, in the order of the report."""

from tests.conformance.properties import (
    attention,
    batch,
    calls,
    combination,
    interface,
    local,
    masks,
    precision,
    routing,
)
from tests.conformance.registry import REGISTERED

ORDER = (interface, attention, batch, combination, local, masks, routing, precision, calls)
PROPERTIES = {p.name: p for module in ORDER for p in REGISTERED if p.module == module.__name__}
