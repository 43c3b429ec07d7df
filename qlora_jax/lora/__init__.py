"""LoRA as data and pure functions; nothing here knows a model class.

config -> targets (what a configuration selects) -> functional (the update) -> init;
combine and multi work on several adapters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
