"""The suite that tests the suite: faults in a copy of `optimized/` and of the contract that
it takes from `reference/`, one at a time, each of which must turn it red.

    pytest tests/mutants --mutants                       # all that a CPU can kill
    pytest tests/mutants --mutants --only combine        # names that contain a word
    pytest tests/mutants --mutants --device cuda         # those that only a GPU can kill too
    python -m tests.mutants --report                     # the same, and writes the report and the picture

One file each: `mutant` (what a fault is), `registry` (the faults, by stage), `profiles` (which tests a file's faults
face), `runner` and `child` (a run), `matrix` (table, picture, JSON).
"""
