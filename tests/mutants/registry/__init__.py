"""All mutants, by the stage that they damage."""

from ..mutant import Mutant
from . import attention, combination, dispatch, gpu, layer, local_attention, rows, selection, solvers

MUTANTS: tuple[Mutant, ...] = (
    *selection.MUTANTS,
    *solvers.MUTANTS,
    *dispatch.MUTANTS,
    *rows.MUTANTS,
    *attention.MUTANTS,
    *local_attention.MUTANTS,
    *combination.MUTANTS,
    *layer.MUTANTS,
    *gpu.MUTANTS,
)
