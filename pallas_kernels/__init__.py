"""Array kernels: arrays in, arrays out, importing nothing but jax.

Every kernel has a plain reference (the "xla" implementation, good in itself: it is what
most devices run), its derivative, and one argument `implementation` to choose.
"""

from pallas_kernels.attention import flash_attention as flash_attention
from pallas_kernels.nf4 import NF4_CODE as NF4_CODE
from pallas_kernels.nf4 import Nested as Nested
from pallas_kernels.nf4 import dequantize_absmax as dequantize_absmax
from pallas_kernels.nf4 import nf4_dequantize as nf4_dequantize
from pallas_kernels.nf4 import nf4_matmul as nf4_matmul
