"""Background processing for image uploads, as Dagster assets.

A good reading order: `models` (the data types), `definitions` (the pipeline on one screen),
`defs.assets` (the processing of an image), `defs.sensors` (how uploads start runs), then `imaging`,
`services` and `stores` (the work itself, independent of Dagster), and finally `runtime` and `cli`
(how the pipeline is started and used).
"""

__version__ = "0.1.0"
