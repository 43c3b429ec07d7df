"""Array kernels: arrays in, arrays out, importing nothing but jax.

Every kernel has a plain reference, its derivative, and one argument `implementation` to
choose: "xla" runs on every device, "pallas" is the kernel.
"""

from pallas_kernels.attention.api import flash_attention as flash_attention
from pallas_kernels.nf4.api import nf4_dequantize as nf4_dequantize
from pallas_kernels.nf4.api import nf4_matmul as nf4_matmul
from pallas_kernels.nf4.reference import NF4_CODE as NF4_CODE
from pallas_kernels.nf4.reference import Nested as Nested
from pallas_kernels.nf4.reference import dequantize_absmax as dequantize_absmax
