"""The Llama model: its configuration, layers and parameters.

config -> layers, attention -> llama; params (names, shapes and counts), vocabulary
(untrained and new tokens), sharding (devices and host memory).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
