"""QLoRA fine-tuning of Llama models in JAX.

The public names are listed in `__init__.pyi`, which type checkers read as well. Each is
imported from its module on first use (PEP 562), so that `import qlora_jax` is cheap and
opens no device.
"""

import lazy_loader

from qlora_jax.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
