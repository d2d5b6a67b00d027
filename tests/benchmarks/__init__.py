"""Speed and memory of the layer beside everything that it may replace, from one process.

    python -m tests.benchmarks --device cuda --out tests/reports/benchmarks-h100.json
    python -m tests.benchmarks --device cpu --out tests/reports/benchmarks-cpu.json
    python docs/benchmarks.py                                # tables and plots of these files
    pytest tests/benchmarks -m speed --device cuda           # the same, small, through pytest-benchmark

One file each: `shapes` (what is measured), `flops` (the explicit count), `competitors` and `attentions` (who takes
part), `measure` (time, memory, kernels), `stages` (whose kernel is it), `floor` (what the bare library calls cost),
`session` (the run).
"""
