"""All mutants, by the stage that they damage."""

from ..mutant import Mutant
from . import (
    attention,
    causal,
    combination,
    dispatch,
    gpu,
    layer,
    local_attention,
    parallel,
    rows,
    selection,
    solvers,
    step,
    window,
)

STAGES = (
    selection,
    solvers,
    dispatch,
    rows,
    attention,
    local_attention,
    combination,
    layer,
    window,
    causal,
    step,
    parallel,
    gpu,
)
MUTANTS: tuple[Mutant, ...] = tuple(
    edit(name, file) for stage in STAGES for file, edits in stage.EDITS.items() for name, edit in edits.items()
)
