"""The lines for nginx in docs/events.md serve variants, and nothing else."""

import http.client
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from imagepipeline.stores.files import FileStore

DOCS = Path(__file__).parent.parent / "docs"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
CONFIG = """
daemon on; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
    server {{ listen unix:{folder}/socket; {server} }}
}}
"""


@pytest.fixture
def ask(tmp_path):
    """A function that asks nginx for a path; returns the status and the headers."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    [lines] = re.findall(r"```nginx\n(.*?)```", (DOCS / "events.md").read_text(), re.DOTALL)
    lines = lines.replace("/srv/storage", str(tmp_path / "storage"))
    in_http, in_server = lines.split("# In `server`:")
    config = tmp_path / "nginx.conf"
    config.write_text(CONFIG.format(folder=tmp_path, http=in_http, server=in_server))
    command = [NGINX, "-p", tmp_path, "-c", config, "-e", tmp_path / "error.log"]
    started = subprocess.run(command, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr

    def ask(path, method="HEAD", **headers):
        connection = http.client.HTTPConnection("nginx")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(tmp_path / "socket"))
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=names)
        answer = connection.getresponse()
        connection.close()
        return answer.status, answer.headers

    yield ask
    subprocess.run([*command, "-s", "stop"], check=True)


def test_nginx_serves_variants_with_the_right_headers_and_nothing_else(ask, tmp_path):
    files = FileStore(tmp_path / "storage")
    for path in ("original/abc.html", "variants/abc-sm.webp", "variants/2026/abc-sm.avif"):
        files.write(path, b"content")
    files.write("variants/other.html", b"<script>")
    files.write("variants/.part.tmp", b"half")

    status, headers = ask("/variants/abc-sm.webp")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert headers["Cache-Control"] == "public, no-cache"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask("/variants/abc-sm.webp", If_None_Match=headers["ETag"])[0] == 304

    status, headers = ask("/variants/2026/abc-sm.avif?g=3")
    assert (status, headers["Content-Type"]) == (200, "image/avif")
    assert headers["Cache-Control"] == "public, max-age=31536000, immutable"

    status, headers = ask("/variants/none.webp?g=3")
    assert (status, headers["Cache-Control"]) == (404, None)
    assert ask("/variants/other.html")[1]["Content-Type"] == "application/octet-stream"
    for path in ("/original/abc.html", "/variants/../original/abc.html", "/variants/.part.tmp"):
        assert ask(path)[0] == 404
    assert ask("/variants/")[0] == 403
    assert ask("/variants/abc-sm.webp", method="POST")[0] == 405
