"""Memory and work of a training step, known before it runs.

Reading order: plan (which settings fit a GPU), step (the program and its memory),
compile (for a GPU that is not installed), estimate (the closed form), gpus (data
sheets). The time of a compiled program: hlo (its text), work (bytes and operations of
each kernel), categories (what each serves), roofline (rates and times), trace (measured
times in the same categories).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
