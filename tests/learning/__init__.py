"""What models learn: recall over a distance, text, masked text, and the optimized package beside the reference.

`trial` is one run, from its settings to its figures; `grid` says which runs there are, `workers` spreads them over
devices, `report` keeps them, `summary` and `pictures` show them. `python -m tests.learning --help`.
"""
