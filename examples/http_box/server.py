"""The owner's side: a classifier that answers over HTTP. ``python examples/http_box/server.py CHECKPOINT [PORT]``

POST images [N, C, H, W] float32 in [0, 1] as a .npy file; the answer is one of logits [N, K]. Only this machine can reach it.
"""

import io
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from dzhpc import config, data
from dzhpc.tasks.defense.classifier import load_network

INPUT = Path(__file__).with_name("defense.toml")


class Handler(BaseHTTPRequestHandler):
    """One question, one answer."""

    def do_POST(self):
        question = self.rfile.read(int(self.headers["Content-Length"]))
        images = torch.from_numpy(np.load(io.BytesIO(question), allow_pickle=False))
        answer = io.BytesIO()
        np.save(answer, self.server.network(images).numpy())
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer.getvalue())))
        self.end_headers()
        self.wfile.write(answer.getvalue())

    def log_message(self, *args):
        pass


def main(checkpoint: str, port: str = "8731") -> None:
    torch.set_num_threads(1)
    settings = config.load(INPUT, [f"task.classifier={checkpoint}"])
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.network = load_network(settings, data.load(settings.data, 0), torch.device("cpu"))
    print(f"{checkpoint} answers at http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
