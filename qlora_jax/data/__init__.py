"""From data files to batches, in numpy alone.

Modules in reading order: `config` (the settings), `rows` and `sources` (what is read),
`chat` and `encoding` (rows to tokens and labels), `arrays` (the examples and their
cache), `examples` (`load_examples`, which runs all of these), `mixture` (packing and
several sources), `held_out`, `batches`; `report` and `notes` describe the data.

`load_examples` reads and labels the data once. `Batches` is a function of an index, so
the position of a run in its data is one number.
"""

from qlora_jax.data.arrays import Examples as Examples
from qlora_jax.data.batches import Batches as Batches
from qlora_jax.data.batches import eval_batches as eval_batches
from qlora_jax.data.batches import prefetch as prefetch
from qlora_jax.data.config import DataConfig as DataConfig
from qlora_jax.data.config import Source as Source
from qlora_jax.data.examples import data_size as data_size
from qlora_jax.data.examples import load_examples as load_examples
from qlora_jax.data.held_out import content_keys as content_keys
from qlora_jax.data.held_out import hold_out as hold_out
from qlora_jax.data.mixture import Mixture as Mixture
from qlora_jax.data.notes import data_notes as data_notes
from qlora_jax.data.report import DataReport as DataReport
