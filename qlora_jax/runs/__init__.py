"""A training run: its settings, its directory, and the steps taken in it.

config, toml -> directory, loading -> prepare, compiled_step -> runner -> evaluation,
checkpoint, resume, interruption, metrics -> plots, report.
"""
