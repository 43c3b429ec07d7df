"""From data files to batches, in numpy alone.

    sources, rows -> encoding (chat) -> examples (arrays) -> mixture -> batches

`load_examples` reads and labels the data once; `Batches` is a function of an index, so
the whole cursor of a run is one number.
"""
