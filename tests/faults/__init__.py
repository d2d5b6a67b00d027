"""Wrong on purpose: every fault that the suite puts in to see that it is noticed, and the public bugs they re-enact.

`taxonomy` names classes and public bugs, for the edits of `tests/mutants` too. The faults, by how they are put in:
`layers` and `causal` (the reference's layers, spoiled), `computations` (the reference, with an operation changed),
`results` (an answer, changed) and `operators` (`optimized`, with a function in another's place). `FAULTS` in `registry`
has them all.
"""
