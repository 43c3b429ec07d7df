"""A training run: its settings, its directory, and the steps taken in it.

config, toml -> directory, loading -> prepare, compiled_step -> runner -> evaluation,
checkpoint, resume, interruption, metrics -> plots, report.

Several processes: place, channel -> hub -> processes, watchdog.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
