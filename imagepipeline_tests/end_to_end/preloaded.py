"""Imports what the runs of `one_run` need, once, in the forkserver from which they are forked."""

import gc

import lance_namespace  # noqa: F401  (LanceDB's largest import; LanceDB itself starts threads)

import imagepipeline_tests.end_to_end.one_run  # noqa: F401
from imagepipeline.imaging.sandbox import DECODERS

DECODERS.prepare()
gc.collect()
gc.freeze()
