"""What must hold of a strictly causal layer, in the order of the report: `pytest --impl module:callable --causal`."""

from tests.conformance.causal import attention, batch, cache, calls, interface, law, local, masks, memory, queries
from tests.conformance.registry import REGISTERED

ORDER = (law, interface, batch, local, attention, queries, memory, masks, cache, calls)
PROPERTIES = {p.name: p for module in ORDER for p in REGISTERED if p.module == module.__name__}
