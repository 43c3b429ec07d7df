"""From data files to batches, in numpy alone.

Modules in reading order: `config` (the settings), `rows`, `tables` and `sources` (what
is read), `conversations`, `chat`, `rendering` and `text_formats` (rows to texts),
`segments` and `encoding` (texts to tokens and labels), `arrays` (the examples and their
cache), `examples` (`load_examples`, which runs all of these), `packing`, `mixture`
(shares of several sources), `held_out`, `batches`; `report` and `notes` describe the
data.

`load_examples` reads and labels the data once. `Batches` is a function of an index, so
the position of a run in its data is one number.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
