"""Background processing for image uploads: a Redis list in, Dagster assets inside, searchable images out.

Read in this order: `models` (the nouns), `definitions` (the pipeline on one screen), `defs.assets`
(what happens to an image), `defs.sensors` (how an upload gets there), then `imaging`, `services` and
`stores` (the work itself, free of Dagster), at last `runtime` and `cli` (how it is started and used).
"""

__version__ = "0.1.0"
