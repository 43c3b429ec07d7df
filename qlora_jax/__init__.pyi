# The public names of `qlora_jax`, by chapter.

# --- Models ---
from .runs.loading import load as load
from .inference.model import Model as Model
from .models.llama import Llama as Llama
from .models.llama import add_parameters as add_parameters

# --- Layers for custom modules ---
from .models.layers import Compute as Compute
from .models.layers import Linear as Linear
from .models.layers import Embed as Embed
from .models.layers import RMSNorm as RMSNorm
from .models.block import Attention as Attention
from .models.block import MLP as MLP

# --- Configuration, in the terms of Hugging Face and PEFT ---
from .models.config import LlamaConfig as LlamaConfig
from .lora.config import LoraConfig as LoraConfig
from .data.config import DataConfig as DataConfig
from .data.config import Source as Source
from .training.config import TrainConfig as TrainConfig
from .runs.config import RunConfig as RunConfig
from .runs.config import ModelConfig as ModelConfig
from .runs.config import CheckpointConfig as CheckpointConfig
from .runs.config import EvalConfig as EvalConfig
from .runs.config import LogConfig as LogConfig

# --- Quantized weights ---
from .nf4 import NF4Tensor as NF4Tensor
from .nf4 import quantize as quantize
from .nf4 import dequantize as dequantize
from .nf4 import fingerprint_tree as fingerprint_tree

# --- Adapters ---
from .lora.init import init_adapters as init_adapters
from .lora.functional import bind as bind
from .lora.init import factor_out as factor_out
from .lora.init import absorb as absorb
from .lora.combine import combine_adapters as combine_adapters
from .lora.multi import stack_adapters as stack_adapters
from .lora.multi import with_rows as with_rows

# --- Vocabulary ---
from .models.vocabulary import untrained_rows as untrained_rows
from .models.vocabulary import report_untrained as report_untrained
from .models.vocabulary import repair_rows as repair_rows
from .models.vocabulary import add_tokens as add_tokens

# --- Data ---
from .data.examples import load_examples as load_examples
from .data.batches import Batches as Batches
from .data.batches import prefetch as prefetch

# --- Training ---
from .training.step import TrainState as TrainState
from .training.step import init_state as init_state
from .training.optimizer import make_optimizer as make_optimizer
from .training.step import train_step as train_step
from .training.step import eval_step as eval_step
from .compiler import compiler_options as compiler_options
from .training.loss import cross_entropy_sum as cross_entropy_sum
from .runs.runner import run as run

# --- Use ---
from .inference.decode import generate_tokens as generate_tokens
from .planning.estimate import parameter_report as parameter_report
from .inference.compare import compare_logits as compare_logits
from .runs.evaluation import measure_loss as measure_loss

# --- Errors ---
from .errors import UserError as UserError
from .errors import CheckpointError as CheckpointError
from .runs.interruption import RunInterrupted as RunInterrupted

__version__: str
