"""A server for --reward http://HOST:PORT/score: put your model into `score`.

It needs Pillow alone: your model may have an environment, or a machine, of its own. The protocol is
in docs/rewards.md.

REWARD_API_KEY=secret python examples/reward_server.py --port 8000
"""

import argparse
import base64
import hmac
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat

LARGEST_BODY = 256 << 20
"""Bytes; a request has 16 pictures, of about 0.7 MB each at 512 px."""
ONE_AT_A_TIME = threading.Lock()


def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """How much redder than green and blue each picture is, in [-1, 1]; higher is better."""
    means = [ImageStat.Stat(image).mean for image in images]
    return [(red - (green + blue) / 2) / 255 for red, green, blue in means]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        key, given = os.environ.get("REWARD_API_KEY"), self.headers["Authorization"] or ""
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return self.answer(401, {"error": "REWARD_API_KEY is another one here"})
        try:
            length = max(0, int(self.headers["Content-Length"]))
            if length > LARGEST_BODY:
                return self.answer(413, {"error": f"a body of more than {LARGEST_BODY} bytes"})
            body = json.loads(self.rfile.read(length))
            files = [io.BytesIO(base64.b64decode(image)) for image in body["images"]]
            images, prompts = [Image.open(file).convert("RGB") for file in files], body["prompts"]
            if len(images) != len(prompts):
                raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        except Exception as error:  # whatever a body has, its sender is told
            return self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        with ONE_AT_A_TIME:
            scores = score(images, prompts)
        self.answer(200, {"scores": scores})

    def answer(self, status: int, body: dict):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    print(f"http://{args.host}:{server.server_port}/score", flush=True)
    server.serve_forever()
