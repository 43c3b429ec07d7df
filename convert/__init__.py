"""Other people's files: HF, bitsandbytes and PEFT directories, in and out."""

from convert.hf import abstract_llama as abstract_llama
from convert.hf import load_llama as load_llama
from convert.hf import save_llama as save_llama
from convert.merging import merge as merge
from convert.peft import check_adapter as check_adapter
from convert.peft import load_adapter as load_adapter
from convert.peft import save_adapter as save_adapter
