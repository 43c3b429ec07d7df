"""From a data file to batches, in numpy alone.

    rows -> chat, segments -> examples -> packing -> batches

`load_examples` reads and labels a file once; `Batches` is a function of an index, so
the whole cursor of a run is one number.
"""

from qlora_jax.data.batches import Batches as Batches
from qlora_jax.data.batches import eval_batches as eval_batches
from qlora_jax.data.batches import prefetch as prefetch
from qlora_jax.data.examples import DataConfig as DataConfig
from qlora_jax.data.examples import DataReport as DataReport
from qlora_jax.data.examples import Examples as Examples
from qlora_jax.data.examples import load_examples as load_examples
