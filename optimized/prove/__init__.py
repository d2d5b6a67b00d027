"""The main job, `python -m optimized`: see `job`."""
