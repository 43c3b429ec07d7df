"""Checkpoints and adapters of others: Hugging Face, bitsandbytes and PEFT directories.

In reading order: `names` (of tensors), `files` and `output` (safetensors, directories),
`checkpoint`, `bnb` and `hf` (base models), `peft`, `peft_reading` and `peft_writing`
(adapters), `companions` and `tokenizer` (files for text), `merged_weights` and
`merging` (both together), `verify` (comparison).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
