"""QLoRA fine-tuning of Llama models in JAX.

This module is the table of contents: every public name, and the module it lives in.
A name is imported when it is first used (PEP 562), so that `import qlora_jax` is cheap,
opens no device, and lets `convert` use the core's data types without a circle.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qlora_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from qlora_jax.adapters import combine_adapters as combine_adapters
    from qlora_jax.adapters import stack_adapters as stack_adapters
    from qlora_jax.adapters import with_rows as with_rows
    from qlora_jax.compare import compare_logits as compare_logits
    from qlora_jax.config import LlamaConfig as LlamaConfig
    from qlora_jax.data.batches import Batches as Batches
    from qlora_jax.data.batches import prefetch as prefetch
    from qlora_jax.data.examples import load_examples as load_examples
    from qlora_jax.data.settings import DataConfig as DataConfig
    from qlora_jax.data.settings import Source as Source
    from qlora_jax.errors import CheckpointError as CheckpointError
    from qlora_jax.errors import UserError as UserError
    from qlora_jax.fingerprint import fingerprint_tree as fingerprint_tree
    from qlora_jax.generate import generate_tokens as generate_tokens
    from qlora_jax.linear import Compute as Compute
    from qlora_jax.llama import Llama as Llama
    from qlora_jax.llama import add_parameters as add_parameters
    from qlora_jax.lora import bind as bind
    from qlora_jax.lora_config import LoraConfig as LoraConfig
    from qlora_jax.lora_init import absorb as absorb
    from qlora_jax.lora_init import factor_out as factor_out
    from qlora_jax.lora_init import init_adapters as init_adapters
    from qlora_jax.loss import cross_entropy_sum as cross_entropy_sum
    from qlora_jax.memory import parameter_report as parameter_report
    from qlora_jax.model import Model as Model
    from qlora_jax.model import load as load
    from qlora_jax.nf4 import NF4Tensor as NF4Tensor
    from qlora_jax.nf4 import dequantize as dequantize
    from qlora_jax.nf4 import quantize as quantize
    from qlora_jax.optimizer import make_optimizer as make_optimizer
    from qlora_jax.runner import run as run
    from qlora_jax.runs.config import CheckpointConfig as CheckpointConfig
    from qlora_jax.runs.config import EvalConfig as EvalConfig
    from qlora_jax.runs.config import LogConfig as LogConfig
    from qlora_jax.runs.config import ModelConfig as ModelConfig
    from qlora_jax.runs.config import RunConfig as RunConfig
    from qlora_jax.train import TrainState as TrainState
    from qlora_jax.train import eval_step as eval_step
    from qlora_jax.train import init_state as init_state
    from qlora_jax.train import train_step as train_step
    from qlora_jax.train_config import TrainConfig as TrainConfig
    from qlora_jax.vocabulary import add_tokens as add_tokens
    from qlora_jax.vocabulary import repair_rows as repair_rows
    from qlora_jax.vocabulary import report_untrained as report_untrained
    from qlora_jax.vocabulary import untrained_rows as untrained_rows

# Name -> module. The imports above say the same to type checkers; a test compares them.
_CONTENTS = {
    # --- The front door ---
    "load": "qlora_jax.model",
    "Model": "qlora_jax.model",
    # --- Configuration, in the words of HF and PEFT ---
    "LlamaConfig": "qlora_jax.config",
    "LoraConfig": "qlora_jax.lora_config",
    "DataConfig": "qlora_jax.data.settings",
    "Source": "qlora_jax.data.settings",
    "TrainConfig": "qlora_jax.train_config",
    "RunConfig": "qlora_jax.runs.config",
    "ModelConfig": "qlora_jax.runs.config",
    "CheckpointConfig": "qlora_jax.runs.config",
    "EvalConfig": "qlora_jax.runs.config",
    "LogConfig": "qlora_jax.runs.config",
    # --- The model ---
    "Llama": "qlora_jax.llama",
    "add_parameters": "qlora_jax.llama",
    "Compute": "qlora_jax.linear",
    # --- Quantized weights ---
    "NF4Tensor": "qlora_jax.nf4",
    "quantize": "qlora_jax.nf4",
    "dequantize": "qlora_jax.nf4",
    # --- Adapters ---
    "init_adapters": "qlora_jax.lora_init",
    "bind": "qlora_jax.lora",
    "factor_out": "qlora_jax.lora_init",
    "absorb": "qlora_jax.lora_init",
    "combine_adapters": "qlora_jax.adapters",
    "stack_adapters": "qlora_jax.adapters",
    "with_rows": "qlora_jax.adapters",
    # --- Vocabulary ---
    "untrained_rows": "qlora_jax.vocabulary",
    "report_untrained": "qlora_jax.vocabulary",
    "repair_rows": "qlora_jax.vocabulary",
    "add_tokens": "qlora_jax.vocabulary",
    # --- Data ---
    "load_examples": "qlora_jax.data.examples",
    "Batches": "qlora_jax.data.batches",
    "prefetch": "qlora_jax.data.batches",
    # --- Training ---
    "TrainState": "qlora_jax.train",
    "init_state": "qlora_jax.train",
    "make_optimizer": "qlora_jax.optimizer",
    "train_step": "qlora_jax.train",
    "eval_step": "qlora_jax.train",
    "cross_entropy_sum": "qlora_jax.loss",
    "run": "qlora_jax.runner",
    # --- Use ---
    "generate_tokens": "qlora_jax.generate",
    "parameter_report": "qlora_jax.memory",
    "compare_logits": "qlora_jax.compare",
    "fingerprint_tree": "qlora_jax.fingerprint",
    # --- Errors ---
    "UserError": "qlora_jax.errors",
    "CheckpointError": "qlora_jax.errors",
}

__all__ = ["__version__", *_CONTENTS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use."""
    if name not in _CONTENTS:
        raise AttributeError(f"module `qlora_jax` has no attribute `{name}`")
    value = getattr(importlib.import_module(_CONTENTS[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_CONTENTS})
