"""Loaded models: generation, chat and comparison.

Reading order: model (`Model`), text (input checks, streams, chat prompts), decode (the
generation loop), sampling (config: its settings); identity (which base an adapter
belongs to), compare.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
