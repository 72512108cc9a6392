"""A vision model of your own behind an OpenAI-compatible address, here one that knows colours only.

    python examples/vision_server.py 8000                             # in another terminal
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 imagepipeline up

Put your model in the place of `describe`. An address other than this machine's should be https.
"""

import base64
import io
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageStat


def describe(picture: Image.Image) -> dict[str, Any]:
    """Return the five fields that imagepipeline asks for."""
    red, green, blue = map(round, ImageStat.Stat(picture.convert("RGB")).mean)
    shape = "landscape" if picture.width > picture.height else "portrait"
    light = "bright" if red + green + blue > 3 * 127 else "dark"
    return {
        "description": f"A {light} {shape} picture of {picture.width} by {picture.height} pixels.",
        "tags": [light, shape],
        "category": "picture",
        "dominantColors": [f"#{red:02x}{green:02x}{blue:02x}"],
        "mood": light,
    }


class ChatCompletions(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions: a prompt and a JPEG come in, a JSON object goes out."""

    def do_POST(self) -> None:
        """Answer one request."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = request["messages"][0]["content"]
        [url] = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        message = {"role": "assistant", "content": json.dumps(describe(picture))}
        completion = {
            "id": f"chatcmpl-{time.time_ns()}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        body = json.dumps(completion).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), ChatCompletions).serve_forever()
