"""A classifier that lives behind HTTP, as a black box: ``task.classifier = "box:classify"``."""

import io
import os
import urllib.request

import numpy as np

URL = os.environ.get("BOX_URL", "http://127.0.0.1:8731/")
LIMIT = 60.0  # seconds that an answer may take: a call that never returned would hold up the run
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a cluster's proxy has no business on the loopback


def classify(images: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] float32 in [0, 1] -> logits [N, K]. Raises whatever goes wrong: the run then asks again."""
    question = io.BytesIO()
    np.save(question, images)
    with open_url(URL, question.getvalue(), timeout=LIMIT) as answer:
        return np.load(io.BytesIO(answer.read()), allow_pickle=False)
