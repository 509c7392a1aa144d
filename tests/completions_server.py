"""A stand-in for vLLM's, SGLang's and llama.cpp's server: samples from the tiny model, one seed each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer

#: Status, headers and body of an answer in the place of the next.
Answer = tuple[int, dict[str, str], bytes]


class StandIn:
    """What the server does, to be changed by a test, and what it was asked.

    Attributes:
        dialect: "vllm"; "llamacpp", which knows no stop tokens but EOS; or "text", which gives no ids.
        models: what /v1/models lists.
        version: what /version tells.
        change: what is done to a completion before it is sent.
        once: answers to the next requests for a completion, one each, whatever they ask.
        instead: answers to all requests for a completion after those; the last one stays.
        hold: called with each request for a completion before it is answered.
        asked: bodies of the requests for a completion.
        headers: of every request.
        paths: of every request.
    """

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.models: list[dict[str, Any]] = [
            {"id": "/models/of/the/server/tiny", "owned_by": "vllm", "max_model_len": 512}
        ]
        self.version = "0.32.0"
        self.change: Callable[[dict[str, Any]], object] = lambda choice: None
        self.once: list[Answer] = []
        self.instead: list[Answer] = []
        self.hold: Callable[[], object] = lambda: None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.url = ""
        self.model = tiny_model()
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One choice, as the dialect has it."""
        stops = {0} if self.dialect == "llamacpp" else {0, *body["stop_token_ids"]}
        ids, log_probs = list(body["prompt"]), []
        draw = torch.Generator().manual_seed(body["seed"])
        with torch.no_grad():
            while len(log_probs) < body["max_tokens"] and not (log_probs and ids[-1] in stops):
                logits = self.model(torch.tensor([ids])).logits[0, -1]
                # As vLLM has it: before the temperature.
                known = logits.log_softmax(0)
                chances = (logits / max(body["temperature"], 1e-6)).softmax(0)
                ids.append(int(torch.multinomial(chances, 1, generator=draw)))
                log_probs.append(float(known[ids[-1]]))
        ids = ids[len(body["prompt"]) :]
        stopped = ids[-1] in stops
        told = ids[:-1] if stopped else ids
        choice: dict[str, Any] = {
            "text": tiny_tokenizer().decode(told),
            "finish_reason": "stop" if stopped else "length",
        }
        if self.dialect == "vllm":
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
            choice["logprobs"] = {"token_logprobs": log_probs}
        elif self.dialect == "llamacpp" and body["logprobs"]:
            entries = zip(ids, log_probs, strict=True)
            choice["logprobs"] = {"content": [{"id": i, "logprob": x} for i, x in entries]}
        elif stopped and ids[-1]:
            choice["stop_reason"] = ids[-1]
        return choice

    def post(self, body: dict[str, Any]) -> Answer:
        self.hold()
        # torch's threads are few: one at a time is faster.
        with self.lock:
            self.asked.append(body)
            if self.once:
                return self.once.pop(0)
            if self.instead:
                return self.instead.pop(0) if len(self.instead) > 1 else self.instead[0]
            choice = self.complete(body)
        self.change(choice)
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    def get(self, path: str) -> Answer:
        # What a proxy is asked for is a whole URL.
        if path.endswith("/v1/models"):
            return 200, {}, json.dumps({"data": self.models}).encode()
        if path.endswith("/version") and self.version:
            return 200, {}, json.dumps({"version": self.version}).encode()
        return 404, {}, b"{}"


@contextmanager
def serving(dialect: str = "vllm") -> Iterator[StandIn]:
    """A stand-in that serves on a port of its own while the block runs."""
    stand_in = StandIn(dialect)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, found: Answer) -> None:
            status, headers, body = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.note()
            self.answer(stand_in.get(self.path))

        def do_POST(self) -> None:
            self.note()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/v1/completions"
            self.answer(stand_in.post(body) if known else (404, {}, b"{}"))

        def note(self) -> None:
            stand_in.headers.append(dict(self.headers))
            stand_in.paths.append(self.path)

        def log_message(self, *_: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 256
        block_on_close = False

        def handle_error(self, *_: Any) -> None:
            pass

    with Listener(("127.0.0.1", 0), Handler) as server:
        stand_in.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
