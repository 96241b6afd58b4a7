"""Small archives of CIFAR's format, and a server they are downloaded from."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from datamodules.cifar import KINDS

PER_FILE = 100


class OldPickler(pickle.Pickler):
    """Writes arrays as the real files have them, which NumPy has since moved and deprecated."""

    def reducer_override(self, item):
        return (np.dtype, ("u1", 0, 1), item.__reduce__()[2]) if isinstance(item, np.dtype) else NotImplemented


def pickled(content: dict) -> bytes:
    file = io.BytesIO()
    OldPickler(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Small:
    """A small archive of the real format; ``attributes`` is what torchvision must know of it."""

    def __init__(self, classes: int):
        kind = KINDS[classes]
        self.classes, self.names = classes, [f"class {label}" for label in range(classes)]
        self.pixels, self.files = {}, {}
        noise = np.random.default_rng(classes)
        for name, _ in kind.train_list + kind.test_list:
            self.pixels[name] = noise.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
            labels = [i % 10 for i in range(PER_FILE)]
            content = {"data": self.pixels[name], "labels" if classes == 10 else "fine_labels": labels}
            self.files[name] = pickled(content)
        self.files[kind.meta["filename"]] = pickled({kind.meta["key"]: self.names})
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in reversed(self.files.items()):
                member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.archive = buffer.getvalue()
        self.attributes = {
            "tgz_md5": md5(self.archive),
            "train_list": [[name, md5(self.files[name])] for name, _ in kind.train_list],
            "test_list": [[name, md5(self.files[name])] for name, _ in kind.test_list],
            "meta": kind.meta | {"md5": md5(self.files[kind.meta["filename"]])},
        }


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


SMALL = {classes: Small(classes) for classes in (10, 100)}


class Server(ThreadingHTTPServer):
    """Serves ``content`` whatever the path; answer number ``stall_at`` stops half way until ``release``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests, self.stall_at = b"", 0, 0
        self.stalled, self.release = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/archive.tar.gz"

    def handle_error(self, request, client_address) -> None:
        """torchvision hangs up on its first request once it has the headers."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        stall = self.server.requests == self.server.stall_at
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        half = len(self.server.content) // 2
        self.wfile.write(self.server.content[:half])
        self.wfile.flush()
        if stall:
            self.server.stalled.set()
            self.server.release.wait(60)
        self.wfile.write(self.server.content[half:])

    def log_message(self, format, *args) -> None:
        pass
