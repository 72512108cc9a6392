"""An image whose decoder is compromised fails, whatever the decoder answers."""

from contextlib import closing

import pytest

from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox, Zygote
from imagepipeline.originals import Originals
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.imaging import lying_operations

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("lie", "status"), [("", "completed"), ("preview", "failed"), ("no picture", "failed")]
)
def test_an_image_whose_decoder_lies_fails_without_a_retry(
    run, catalogue, files, monkeypatch, lie, status
):
    monkeypatch.setattr("imagepipeline.originals.decode", lying_operations.decode)
    files.put_original("cat", (PHOTOS / "cat.jpg").read_bytes() + b"lie:" + lie.encode(), "jpg")
    with (
        closing(Zygote("imagepipeline_tests.imaging.lying_operations")) as zygote,
        closing(Originals(files, Sandbox(zygote=zygote), Rules())) as originals,
    ):
        run("cat", originals=originals)
    row = catalogue.get("cat")
    assert row["status"] == status
    if status == "failed":
        assert row["reason"] == "corrupt"
        assert "cannot be true" in row["error"]
        assert row["variants"] == []
