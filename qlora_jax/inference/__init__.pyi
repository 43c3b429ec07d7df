# What the other packages use of `qlora_jax.inference`.

from .compare import compare_logits as compare_logits
from .compare import load_exact as load_exact
from .compare import probe as probe
from .config import Sampling as Sampling
from .decode import generate_tokens as generate_tokens
from .identity import base_form as base_form
from .identity import base_mismatch as base_mismatch
from .identity import common_dtype as common_dtype
from .identity import config_mismatch as config_mismatch
from .identity import dense_dtypes as dense_dtypes
from .identity import form_name as form_name
from .identity import main_dtype as main_dtype
from .identity import trained_form as trained_form
from .model import Model as Model
from .model import load_attached as load_attached
from .text import ChatPrompts as ChatPrompts
from .text import TextStream as TextStream
