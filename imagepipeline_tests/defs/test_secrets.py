"""Secrets and pictures leak nowhere, even if the provider echoes them.

Every secret contains a canary, which the tests then look for.
"""

import json

import dagster as dg
import pytest
from werkzeug import Response

from imagepipeline.definitions import defs
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.errors import ImagePipelineError
from imagepipeline.models import Upload
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.services.test_embedder import answer_of
from imagepipeline_tests.services.test_vision import METADATA, completion

pytestmark = pytest.mark.stack

VISION_KEY, EMBEDDING_KEY, REDIS_PASSWORD = (
    "canary-of-vision",
    "canary-of-embedding",
    "canary-of-redis",
)


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_no_secret_and_no_picture_is_stored_or_shown(
    status, httpserver, tmp_path, monkeypatch, queue, redis_url, capfd, create_catalogue
):
    queue.redis.config_set("requirepass", REDIS_PASSWORD)
    pictures = []

    def repeat(request):
        """Echoes the request, as a careless proxy might."""
        sent = request.get_data(as_text=True)
        if "image_url" in sent:
            pictures.append(sent.partition("base64,")[2][3000:3060])
        echo = {
            "message": request.headers["Authorization"] + sent,
            "code": request.headers["Authorization"],
        }
        good = (
            answer_of([1.0, 2.0]) if request.path.endswith("embeddings") else completion(METADATA)
        )
        return Response(
            json.dumps(good if status == 200 else {"error": echo}),
            status,
            content_type="application/json",
        )

    try:
        httpserver.expect_request("/v1/chat/completions").respond_with_handler(repeat)
        httpserver.expect_request("/v1/embeddings").respond_with_handler(repeat)
        url = httpserver.url_for("/v1")
        environment = {
            "IMAGEPIPELINE_HOME": str(tmp_path / "home"),
            "OPENAI_API_KEY": VISION_KEY,
            "OPENAI_BASE_URL": url,
            "OPENROUTER_API_KEY": EMBEDDING_KEY,
            "OPENROUTER_BASE_URL": url,
            "REDIS_URL": redis_url.replace("unix://", f"unix://:{REDIS_PASSWORD}@"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        catalogue = Catalogue(create_catalogue(tmp_path / "home" / "catalogue.sqlite"))
        FileStore(tmp_path / "home" / "storage").put_original(
            "cat", (PHOTOS / "cat.jpg").read_bytes(), "jpg"
        )
        catalogue.accept([Upload("cat")])
        folder = tmp_path / "dagster"
        folder.mkdir()
        with dg.DagsterInstance.local_temp(str(folder)) as instance:
            instance.add_dynamic_partitions("uploads", ["cat"])
            result = (
                defs()
                .resolve_job_def("process_upload")
                .execute_in_process(
                    instance=instance,
                    partition_key="cat",
                    tags={GENERATION_TAG: "1"},
                    raise_on_error=False,
                )
            )
            told = [repr(event) for event in instance.all_logs(result.run_id)] + [
                repr(instance.get_run_by_id(result.run_id))
            ]
        row = catalogue.get("cat")
    except ImagePipelineError as error:  # a secret in a message is a leak too
        told, row = [str(error)], {}
    finally:
        queue.redis.config_set("requirepass", "")
    assert pictures
    assert row["status"] == {200: "completed", 401: "pending"}.get(status, "failed")
    printed = "".join(capfd.readouterr())
    stored = [
        path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix not in (".webp", ".avif")
    ]
    for secret in (VISION_KEY, EMBEDDING_KEY, REDIS_PASSWORD, pictures[0]):
        assert not any(secret in text for text in [*told, printed, repr(row)]), secret
        assert not any(secret.encode() in content for content in stored), secret
