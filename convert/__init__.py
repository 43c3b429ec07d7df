"""Checkpoints and adapters of others: Hugging Face, bitsandbytes and PEFT directories.

In reading order: `names` (of tensors), `files` and `output` (safetensors, directories),
`checkpoint`, `bnb` and `hf` (base models), `peft`, `peft_reading` and `peft_writing`
(adapters), `merged` and `merging` (both together), `verify` (comparison), `tokenizer`.
"""

from convert.hf import abstract_llama as abstract_llama
from convert.hf import load_llama as load_llama
from convert.hf import save_llama as save_llama
from convert.merging import merge as merge
from convert.peft_reading import check_adapter as check_adapter
from convert.peft_reading import load_adapter as load_adapter
from convert.peft_writing import save_adapter as save_adapter
