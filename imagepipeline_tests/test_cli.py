"""The command line, as a person and as a script meet it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from imagepipeline import cli
from imagepipeline.models import ImageMetadata, Recipe
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import PHOTOS


@pytest.fixture
def invoke(monkeypatch, capfd, tmp_path, redis_url, queue):
    """Calls the command line as a shell would; gives exit code, stdout and stderr."""
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REDIS_URL", redis_url)
    (tmp_path / "home").mkdir()

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["imagepipeline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return invoke


@pytest.fixture
def catalogue(invoke, tmp_path):
    catalogue = Catalogue(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}")
    catalogue.migrate()
    return catalogue


def complete(catalogue, image_id, description, home):
    claim = catalogue.claim_anew(image_id, "run")
    metadata = ImageMetadata(description=description, tags=["t"], category="c", dominant_colors=[], mood="calm")
    catalogue.save_metadata(claim, metadata, f"original/{image_id}.jpg", 9, "0" * 64)
    EmbeddingIndex(str(home / "lancedb")).upsert(claim, LocalEmbedder().embed(metadata.embedding_text))
    for asset in ("metadata", "variants", "embedding"):
        catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
    catalogue.finish(claim)


def test_every_command_explains_itself():
    for name in cli.cli.commands:
        result = CliRunner().invoke(cli.cli, [name, "--help"])
        assert result.exit_code == 0
        assert "Exit codes" in result.output
        assert "--json" in result.output


def test_the_command_line_starts_without_what_it_does_not_need():
    script = "import sys, imagepipeline.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["dagster", "lancedb", "pyarrow", "sqlalchemy", "openai", "numpy", "PIL", "redis", "rich.progress"]
    shown = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_push_stores_the_original_and_enqueues_its_id(invoke, tmp_path, queue):
    code, out, _ = invoke("push", str(PHOTOS / "cat.jpg"), "--priority", "3", "--json")
    [row] = json.loads(out)
    assert code == 0
    assert row["image_id"] == "cat-07c5a883"
    stored = tmp_path / "home" / "storage" / "original" / "cat-07c5a883.jpg"
    assert stored.read_bytes() == (PHOTOS / "cat.jpg").read_bytes()
    [entry] = queue.claim(9)
    assert json.loads(entry) == {"imageId": "cat-07c5a883", "path": "original/cat-07c5a883.jpg", "priority": 3}


def test_push_takes_the_id_it_is_given(invoke, queue):
    assert invoke("push", str(PHOTOS / "cat.jpg"), "--id", "tom") == (0, "tom\n", "")
    [entry] = queue.claim(9)
    assert json.loads(entry)["imageId"] == "tom"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["push", "no-such-file.jpg"], 2, "does not exist"),
        (["push"], 2, "Missing argument"),
        (["push", str(PHOTOS / "cat.jpg"), "--id", "../x"], 1, "not an image ID"),
        (["push", str(PHOTOS / "cat.jpg"), str(PHOTOS / "coffee.jpg"), "--id", "x"], 2, "one image"),
        (["push", str(PHOTOS / "cat.jpg"), "--priority", "5000"], 2, "5000"),
        (["status", "nobody"], 1, "nobody"),
        (["search", "  "], 2, "empty"),
    ],
)
def test_wrong_use_is_one_clear_line_and_an_exit_code(invoke, catalogue, queue, arguments, code, message):
    got, out, err = invoke(*arguments)
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert queue.count()["waiting"] == 0


def test_a_malformed_setting_is_exit_code_3(invoke, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    code, _, err = invoke("status")
    assert (code, "OPENAI_BASE_URL" in err) == (3, True)


def test_what_is_not_running_is_exit_code_4(invoke, monkeypatch):
    code, _, err = invoke("status")
    assert (code, "imagepipeline up" in err) == (4, True)
    monkeypatch.setenv("REDIS_URL", "redis://:canary@127.0.0.1:9")
    code, _, err = invoke("push", str(PHOTOS / "cat.jpg"))
    assert (code, "does not answer" in err, "canary" in err) == (4, True, False)


def test_down_without_a_stack_is_no_error(invoke):
    assert invoke("down", "--json") == (0, '{"was_running": false}\n', "")


def test_status_counts_every_state(invoke, catalogue, queue):
    queue.enqueue("a")
    catalogue.claim_anew("b", "run")
    code, out, _ = invoke("status", "--json")
    assert code == 0
    assert json.loads(out) == {"waiting": 1, "pending": 0, "processing": 1, "completed": 0, "failed": 0, "dead": 0}
    assert "processing" in invoke("status")[1]


def test_status_without_redis_still_counts_the_catalogue(invoke, catalogue, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9")
    code, out, err = invoke("status", "--json")
    assert (code, json.loads(out)["waiting"], "does not answer" in err) == (0, None, True)


def test_status_of_one_image_tells_all(invoke, catalogue, tmp_path):
    complete(catalogue, "a", "A [bold]cat[/bold]", tmp_path / "home")
    row = json.loads(invoke("status", "a", "--json")[1])
    assert {"status", "generation", "attempts", "metadata", "variants", "error", "updated_at"} <= row.keys()
    assert row["status"] == "completed"
    assert row["updated_at"].endswith("+00:00")
    assert "[bold]" in invoke("status", "a")[1]  # shown, not obeyed


def test_search_finds_by_meaning(invoke, catalogue, tmp_path):
    complete(catalogue, "pet", "A kitten asleep on a sofa", tmp_path / "home")
    complete(catalogue, "space", "A rocket lifts off at night", tmp_path / "home")
    rows = json.loads(invoke("search", "a cat", "-k", "2", "--json")[1])
    assert [row["image_id"] for row in rows] == ["pet", "space"]
    assert rows[0].keys() == {"image_id", "score", "description"}
    assert rows[0]["score"] > rows[1]["score"]
    assert "kitten" in invoke("search", "a cat")[1]


def test_search_in_an_empty_index_says_so(invoke, catalogue):
    assert "No image" in invoke("search", "a cat")[1]
    assert invoke("search", "a cat", "--json")[1] == "[]\n"
