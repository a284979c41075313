"""A judge on loopback that behaves as badly as it is told to, and remembers what it was asked."""

import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-secret-0123456789"
RATED = "It answers the question. Rating: [[7]]"


class JudgeServer:
    """`behave(request number from 0, user prompt)` is what the server does: one of the methods of Behaviour, bound.

    asked: the user prompts of all requests, in order; replied: of those that got a whole reply with a judgment.
    """

    def __init__(self, behave=None):
        self.behave = behave or (lambda number, prompt: Reply(RATED))
        self.asked, self.replied, self.requests, self.times = [], [], [], []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with server.lock:
                    number = len(server.asked)
                    server.asked.append(prompt)
                    server.requests.append((self.path, self.headers, body))
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    server.behave(number, prompt).on(self, server, prompt)
                except (BrokenPipeError, ConnectionResetError):  # the client has gone
                    self.close_connection = True
                finally:
                    with server.lock:
                        server.at_once -= 1

            def handle(self):
                with suppress(ConnectionError):  # the client has gone, in the middle of a reply
                    super().handle()

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def send(handler, status, body, headers=(), promised=None):
    data = body.encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data) if promised is None else promised))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()


def completion(content, finish="stop", **beside):
    message = {"role": "assistant", "content": content, **beside}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]})


class Reply:
    """A judgment, after some seconds."""

    def __init__(self, content, seconds=0.0):
        self.content, self.seconds = content, seconds

    def on(self, handler, server, prompt):
        time.sleep(self.seconds)
        send(handler, 200, completion(self.content))
        if isinstance(self.content, str) and self.content.strip():
            with server.lock:
                server.replied.append(prompt)


class Status:
    """An error as OpenAI sends it, or with any other body."""

    def __init__(self, status, headers=(), message="try later", body=None, **fields):
        self.status, self.headers = status, headers
        self.body = json.dumps({"error": {"message": message, "code": None, **fields}}) if body is None else body

    def on(self, handler, server, prompt):
        send(handler, self.status, self.body, self.headers)


class Body:
    """A 200 with this body, whatever it is."""

    def __init__(self, body):
        self.body = body

    def on(self, handler, server, prompt):
        send(handler, 200, self.body)


class Truncated:
    """Half of the body that was promised; then the connection ends, in peace or by a reset."""

    def __init__(self, reset=False):
        self.reset = reset

    def on(self, handler, server, prompt):
        body = completion(RATED)
        send(handler, 200, body[: len(body) // 2], promised=len(body.encode()))
        if self.reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        handler.close_connection = True


class Drip:
    """A reply that comes a byte at a time and never ends: none of them is late."""

    def on(self, handler, server, prompt):
        send(handler, 200, "", promised=10**9)
        while not server.released.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        handler.close_connection = True


class Hang:
    """No reply until the server is released."""

    def on(self, handler, server, prompt):
        server.released.wait(60)
        handler.close_connection = True


class HangUp:
    """The connection ends without a reply."""

    def on(self, handler, server, prompt):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
