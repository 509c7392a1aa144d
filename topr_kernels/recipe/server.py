"""Sampling from a server with an OpenAI-compatible completions endpoint: vLLM, SGLang, llama.cpp.

Prompts are sent as the token ids of our tokenizer, and the ids that come back are the completion. The
server may be anybody's, so whatever it says is checked; what it says of log-probabilities is compared
with the model, and never used as mu.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from topr_kernels.recipe.files import one_line, write_json
from topr_kernels.recipe.generate import Completion, answer_seed, as_completion, prompt_token_ids
from topr_kernels.recipe.manifests import read_mapping
from topr_kernels.recipe.models import LOADED_DTYPE, LoadedModel
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.records import Record, Sampling
from topr_kernels.recipe.score import score

T = TypeVar("T")

#: Environment variables that may hold the key. The second is set for another server: it is sent where
#: nobody can listen, and nowhere else.
_KEY, _COMMON_KEY = "TOPR_SERVER_KEY", "OPENAI_API_KEY"
#: Seconds that the server may take to answer, and more for each token that it is asked for.
_PATIENCE, _PER_TOKEN, _SHORT_PATIENCE = 600.0, 0.25, 30.0
#: Seconds before it is asked again, where it says that it is busy.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
#: The longest that it may ask us to wait, in seconds.
_MOST_WAIT = 60.0
#: Bytes that an answer may have, and more for each token that it is of.
_MOST_BYTES, _BYTES_PER_TOKEN = 1 << 20, 1 << 10
#: Requests at once.
_MOST_REQUESTS = 256
#: Prompts that are completed to compare the server with the model, and tokens of each.
_COMPARED, _COMPARED_TOKENS = 8, 16
#: Mean difference of a token's log-probability, in nats, above which the server samples from another
#: policy. SmolLM2-135M has 0.04 in bf16, and 0.07 in llama.cpp's Q4_1; rounding in fp32 is below 1e-4.
_ROUNDING = 0.01

#: Where the token ids of the records come from.
OF_SERVER, OF_TEXT = "of the server", "of its text"
#: Has a server sample from the whole softmax, whatever its defaults: of all servers, and of llama.cpp.
_FULL_SOFTMAX = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "samplers": ["temperature"],
}
#: Has a server give token ids: vLLM and SGLang by the first, llama.cpp by the second, which asks for
#: log-probabilities of the others.
_TOKEN_IDS = {"return_token_ids": True, "logprobs": 1}
#: Where vLLM and SGLang say which stop token ended a completion.
_STOPPED_AT = ("stop_reason", "matched_stop")


class Server:
    """A server of completions.

    Args:
        url: as ``--server`` gives it, with or without its /v1.

    Raises:
        SettingsError: naming the URL: from here if it is not valid, from every method if the server
            cannot be reached, refuses, or says what cannot be.
    """

    def __init__(self, url: str) -> None:
        self.url = server_url(url)
        parts = urllib.parse.urlsplit(self.url)
        self._key = _key(self.url, parts.scheme, here := _is_loopback(parts.hostname or ""))
        # Those of the environment, if any, stand between us and other machines.
        proxies: dict[str, str] | None = {} if here else None
        self._open = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), _NoRedirects()
        ).open

    def error(self, what: str) -> SettingsError:
        """An error of this server."""
        return SettingsError(f"--server {self.url}: {what}")

    def ask(self, path: str, body: Mapping[str, Any] | None = None, tokens: int = 0) -> Any:
        """The JSON that the server answers; None if it knows no such path.

        Args:
            path: from its root.
            body: of a POST; None for a GET.
            tokens: that the answer may have.
        """
        data = None if body is None else json.dumps(body).encode()
        # A GET is answered at once, also where the server is busy.
        patience = _SHORT_PATIENCE if body is None else _PATIENCE + _PER_TOKEN * tokens
        most = _MOST_BYTES + _BYTES_PER_TOKEN * tokens
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, data, headers)
        for wait in (*_WAITS, None):
            try:
                until = time.monotonic() + patience
                with self._open(request, timeout=patience) as answer:
                    content = self._read(answer, most, until)
                break
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (429, 503) and wait is not None:
                        time.sleep(_wait(error.headers.get("Retry-After"), wait))
                    elif error.code == 404:
                        return None
                    else:
                        raise self._refusal(error) from error
            except TimeoutError as error:
                raise self.error(
                    f"no answer in {patience:.0f} s; a smaller --sample-batch asks for less at once"
                ) from error
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                # Some have no room for so many at once. A GET, which comes first, finds nobody there.
                if body is not None and isinstance(reason, ConnectionError) and wait is not None:
                    time.sleep(wait)
                    continue
                raise self.error(
                    f"cannot be reached ({_shown(reason)}); start the server, or correct the URL"
                ) from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.error(
                f"{path} does not answer in JSON; give the URL of an OpenAI-compatible server, such as "
                "vllm serve, SGLang or llama-server"
            ) from error

    def _read(self, answer: Any, most: int, until: float) -> bytes:
        content = bytearray()
        while part := answer.read1(1 << 16):
            content += part
            if len(content) > most:
                raise self.error(f"an answer of more than {most} bytes; expected less")
            # The socket's own limit is of each part.
            if time.monotonic() > until:
                raise TimeoutError
        return bytes(content)

    def _refusal(self, error: urllib.error.HTTPError) -> SettingsError:
        if 300 <= error.code < 400:
            target = _shown(error.headers.get("Location"))
            return self.error(f"redirects to {target}, which is not followed; give that URL")
        if error.code in (401, 403):
            return self.error(f"wants a key (HTTP {error.code}); set {_KEY}")
        if error.code in (429, 503):
            return self.error(
                f"too busy (HTTP {error.code}, asked {len(_WAITS) + 1} times); try later, or with a "
                "smaller --sample-batch"
            )
        # Of whatever it says, a line.
        said = _shown(error.read(2000).decode(errors="replace"))
        remedy = "; its own messages tell why"
        if error.code in (400, 422):
            remedy = (
                "; expected one that takes prompts as token ids, as vLLM, SGLang and llama-server"
            )
        return self.error(f"refused (HTTP {error.code}): {said}{remedy}")


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server tells of itself.

    Args:
        name: of the model, as the server asks for it.
        software: who the server says it is, as "vllm"; "" if it does not.
        version: of the server; "" if it does not tell.
        positions: tokens of prompt and completion together; None if it does not tell.
    """

    name: str
    software: str
    version: str
    positions: int | None


def served(server: Server, model: str) -> Served:
    """What a server serves in the place of ``model``, a folder or hub id.

    Raises:
        SettingsError: if it names no model, or several, unless exactly one has that name.
    """
    listing = server.ask("/v1/models")
    entries = listing.get("data") if isinstance(listing, Mapping) else None
    cards = [x for x in entries or () if isinstance(x, Mapping) and isinstance(x.get("id"), str)]
    if not cards:
        raise server.error(
            "/v1/models names no model; give the URL of an OpenAI-compatible server, such as vllm "
            "serve, SGLang or llama-server"
        )
    wanted = Path(model).resolve().name
    named = [card for card in cards if card["id"].rstrip("/").rpartition("/")[2] == wanted]
    if len(cards) > 1 and len(named) != 1:
        names = _shown(", ".join(card["id"] for card in cards))
        raise server.error(
            f"serves {len(cards)} models ({names}); expected one, or one named {wanted!r}, as --model is"
        )
    card = named[0] if len(named) == 1 else cards[0]
    version = server.ask("/version")
    told = version.get("version") if isinstance(version, Mapping) else ""
    # vLLM and SGLang tell it here, llama.cpp there.
    more = card.get("meta")
    rooms = [card.get("max_model_len"), more.get("n_ctx") if isinstance(more, Mapping) else None]
    return Served(
        card["id"],
        _shown(card.get("owned_by") or ""),
        _shown(told or ""),
        next((room for room in rooms if _is_whole(room)), None),
    )


class ServerSampler:
    """Samples as ``complete`` does, from a server; to be given to ``generate`` as ``sampler``.

    Before the first batch some of its prompts are completed and scored, to see whether the server serves
    the model at all. The step's folder notes what it is; a run that continues must find the same.

    Args:
        url: of the server.
        source: the model, as ``load_model`` takes it.
        loaded: that model. The records say that it sampled, and it scores them.
        partial: folder of an unfinished step.

    Attributes:
        positions: tokens that the server has room for, prompt and completion together; None if it does
            not tell.

    Raises:
        SettingsError: as ``Server`` and ``served``; from a call also if the server says what no sampler
            of the model could, or has changed since the run began.
    """

    def __init__(self, url: str, source: str, loaded: LoadedModel, partial: Path) -> None:
        self._server = Server(url)
        self._served = served(self._server, source)
        self._loaded = loaded
        self._noted = _noted(partial)
        self._facts: dict[str, Any] = {}
        self.positions = self._served.positions

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
        chat: bool = False,
    ) -> list[Completion]:
        """Completes a batch; arguments as those of ``complete``."""
        prompt_ids = [prompt_token_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
        if not self._facts:
            some = [list(ids) for ids in dict.fromkeys(map(tuple, prompt_ids))][:_COMPARED]
            self._facts = self._compare(some, min(max_new_tokens, _COMPARED_TOKENS), stop_ids)
        drawn = self._draw(prompt_ids, max_new_tokens, temperature, seed, stop_ids)
        if any(x.source != self._facts["token_ids"] for x in drawn):
            raise self._server.error("gives token ids for some completions and not for others")
        # Now there is something that others must agree with.
        if not self._noted.exists():
            write_json(self._noted, self._facts)
        stops = set(stop_ids)
        return [
            as_completion(tokenizer, ids, x.token_ids, stops)
            for ids, x in zip(prompt_ids, drawn, strict=True)
        ]

    def _draw(
        self,
        prompt_ids: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[Drawn]:
        """Samples a completion of each prompt, all at once."""

        def draw(i: int) -> Drawn:
            body = {
                "model": self._served.name,
                "prompt": prompt_ids[i],
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": answer_seed(seed, i),
                "stop_token_ids": list(stop_ids),
                **_FULL_SOFTMAX,
                **_TOKEN_IDS,
            }
            answer = self._server.ask("/v1/completions", body, max_new_tokens)
            try:
                return read_drawn(
                    answer, prompt_ids[i], self._loaded, max_new_tokens, set(stop_ids)
                )
            except ValueError as error:
                raise self._server.error(str(error)) from error

        return in_parallel(draw, len(prompt_ids))

    def _compare(
        self, prompt_ids: Sequence[list[int]], tokens: int, stop_ids: Sequence[int]
    ) -> dict[str, Any]:
        """What the server is, once it is seen whether it serves the model.

        At temperature 1, where log-probabilities before and after the temperature are the same.
        """
        drawn = self._draw(prompt_ids, tokens, 1.0, 0, stop_ids)
        facts = {
            "model": _last(self._served.name),
            "software": self._served.software,
            "version": self._served.version,
            "token_ids": drawn[0].source,
        }
        before = read_mapping(self._noted) if self._noted.exists() else facts
        changed = [
            f"{n} {before.get(n)!r} then, {x!r} now" for n, x in facts.items() if before.get(n) != x
        ]
        if changed:
            raise self._server.error(
                f"not the server of the batches that are done: {'; '.join(changed)}; start that one, or "
                "choose another --out"
            )
        if drawn[0].source == OF_TEXT:
            warnings.warn(
                f"--server {self._server.url}: gives no token ids, so those of every record are of its "
                "text, tokenised again: not always what it sampled. vLLM from 0.10.2, SGLang and "
                "llama-server give them",
                stacklevel=4,
            )
        difference = log_prob_difference(self._loaded, prompt_ids, drawn)
        if difference is None:
            warnings.warn(
                f"--server {self._server.url}: gives no log-probabilities, so nothing shows that its "
                f"model, {_shown(self._served.name)!r}, is the one of --model, by which mu is scored",
                stacklevel=4,
            )
        elif difference > _ROUNDING:
            warnings.warn(
                f"--server {self._server.url}: its log-probabilities of a token differ from those of "
                f"--model by {difference:.2g} nats on average, so it samples from another policy than "
                "mu, which no ratio shows. Serve the weights of --model, not quantised, in "
                f"{LOADED_DTYPE} (vllm serve MODEL --dtype {LOADED_DTYPE})",
                stacklevel=4,
            )
        # Rounded, so that runs against one server agree.
        return facts | {"log_prob_difference": None if difference is None else round(difference, 4)}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A completion that a server sampled.

    Args:
        token_ids: with the stop token where it ended by one.
        log_probs: what the server says of each; None if it does not.
        source: where the ids come from, ``OF_SERVER`` or ``OF_TEXT``.
    """

    token_ids: list[int]
    log_probs: list[float] | None
    source: str


def read_drawn(
    answer: Any, prompt: list[int], loaded: LoadedModel, max_new_tokens: int, stops: set[int]
) -> Drawn:
    """Reads what a server says that it sampled.

    Args:
        answer: of its /v1/completions; None if it has none.
        prompt: ids that it was asked to complete.
        loaded: the model.
        max_new_tokens: that it was asked for.
        stops: ids that end a completion.

    Raises:
        ValueError: if the model cannot have sampled that, or not as it was asked to.
    """
    if answer is None:
        raise ValueError("has no /v1/completions; give the URL of an OpenAI-compatible server")
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise ValueError("answers without a completion; expected one choice for the prompt")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ValueError(
            f"ended a completion for the reason {_shown(reason)!r}; expected 'stop' or 'length'; its "
            "own messages tell why"
        )
    asked = choice.get("prompt_token_ids")
    if asked is not None and asked != prompt:
        raise ValueError(
            "completed other token ids than it was given; serve the model without a template or "
            "tokens of its own in front of the prompt"
        )
    ids, source = _token_ids(choice), OF_SERVER
    log_probs = _log_probs(choice, ids)
    if ids is None:
        ids, source = _tokenised(loaded.tokenizer, choice.get("text")), OF_TEXT
    # Some leave the token out that they stopped at, and say it here; none tells EOS.
    last = next((x for n in _STOPPED_AT if _is_whole(x := choice.get(n))), None)
    if reason == "stop" and not stops & set(ids):
        if last in stops:
            ids.append(last)
        elif source == OF_TEXT:
            ids.append(loaded.tokenizer.eos_token_id)
    if any(token >= loaded.vocabulary for token in ids):
        raise ValueError(
            f"gives the token id {max(ids)}, but --model has {loaded.vocabulary} ids: it serves another "
            "model"
        )
    whole = source == OF_TEXT or stops & set(ids) or len(ids) == max_new_tokens
    # A text seldom has more tokens than were sampled, and twice as many only if the server lies.
    if not whole or len(ids) > max_new_tokens * (1 if source == OF_SERVER else 2):
        raise ValueError(
            f"ended a completion ({reason}) after {len(ids)} of {max_new_tokens} tokens, the last of "
            f"them {ids[-1:]}, and not at a stop token of --model; give it more room, or add that token "
            "to eos_token_id in --model's generation_config.json"
        )
    return Drawn(ids, log_probs, source)


def log_prob_difference(
    loaded: LoadedModel, prompt_ids: Sequence[list[int]], drawn: Sequence[Drawn]
) -> float | None:
    """Mean difference of a token's log-probability, the server's to the model's, in nats.

    Args:
        loaded: the model.
        prompt_ids: of each prompt.
        drawn: a completion of each, at temperature 1.

    Returns:
        None if the server does not say any, or says none of these ids.
    """
    sampling = Sampling("", 1.0, 0, 1.0, _COMPARED_TOKENS, 0)
    said = [
        (
            x.log_probs,
            Record(0, "", "", ids, x.token_ids[: len(x.log_probs)], 0.0, "length", sampling),
        )
        for ids, x in zip(prompt_ids, drawn, strict=True)
        if x.log_probs
    ]
    if not said:
        return None
    scored = score(
        loaded.model,
        [record for _, record in said],
        pad_token_id=loaded.tokenizer.pad_token_id,
        batch_size=len(said),
        progress=False,
    )
    differences = [
        abs(x - y)
        for (theirs, _), ours in zip(said, scored, strict=True)
        for x, y in zip(theirs, ours.behavior_log_prob or (), strict=True)
    ]
    return sum(differences) / len(differences)


def server_facts(partial: Path) -> dict[str, Any]:
    """For the figures: what a server is that has sampled, if one has.

    Args:
        partial: folder of an unfinished step.
    """
    noted = _noted(partial)
    return {"server": read_mapping(noted)} if noted.exists() else {}


def _noted(partial: Path) -> Path:
    return partial / "server.json"


def in_parallel(work: Callable[[int], T], count: int) -> list[T]:
    """What ``work`` returns for 0, 1, ... ``count - 1``, each in a thread of its own.

    The first error is raised at once. The threads are daemons, so that neither it nor Ctrl-C has to wait
    for a server to answer.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, work(i), None))
            except BaseException as error:
                done.put((i, None, error))

    for i in range(count):
        todo.put(i)
    for _ in range(min(count, _MOST_REQUESTS)):
        threading.Thread(target=run, daemon=True).start()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            i, value, error = done.get()
            if error is not None:
                raise error
            results[i] = value
    finally:
        over.set()
    return [results[i] for i in range(count)]


def server_url(text: str) -> str:
    """The root of a server: its URL without a slash or /v1 at the end.

    Raises:
        SettingsError: if it is not valid, or holds a password.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if "@" in text:
        raise SettingsError(
            f"server: got a URL with a name or a key before an @; leave it out, and set {_KEY}"
        )
    if not usable or set("?# ") & set(text) or not text.isprintable():
        raise SettingsError(f"server: got {text!r}; expected a URL such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _key(url: str, scheme: str, here: bool) -> str:
    """The key for a server, from the environment; "" if there is none that it may be sent."""
    name = next((n for n in (_KEY, _COMMON_KEY) if os.environ.get(n, "").strip()), "")
    key = os.environ.get(name, "").strip() if name else ""
    if key and not (key.isascii() and key.isprintable()):
        raise SettingsError(f"{name}: holds characters that no header takes; set the key alone")
    if not key or here or scheme == "https":
        return key
    if name == _COMMON_KEY:
        return ""
    warnings.warn(
        f"--server {url}: {_KEY} is sent to another machine over plain http, where others can read it; "
        "use https, or a tunnel to this machine",
        stacklevel=5,
    )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Has a redirect raise HTTPError: it may lead to a host that the key is not for."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _wait(asked: str | None, otherwise: float) -> float:
    """Seconds to wait: those that the server asked for, if it did."""
    try:
        return min(max(0.0, float(asked or otherwise)), _MOST_WAIT)
    except ValueError:
        # A date.
        return otherwise


def _token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids that a choice gives; None if it gives none."""
    # vLLM and SGLang; llama.cpp has them beside the log-probabilities.
    ids = choice.get("token_ids")
    if ids is None:
        ids = [entry.get("id") for entry in _entries(choice)] or None
    if not isinstance(ids, list) or not all(map(_is_whole, ids)):
        return None
    return list(ids)


def _log_probs(choice: Mapping[str, Any], ids: list[int] | None) -> list[float] | None:
    """What a choice says of each of its ids; None if not of each."""
    known = choice.get("logprobs")
    values = known.get("token_logprobs") if isinstance(known, Mapping) else None
    if values is None:
        values = [entry.get("logprob") for entry in _entries(choice)]
    if ids is None or not isinstance(values, list) or len(values) != len(ids):
        return None
    sound = all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    return [float(x) for x in values] if sound else None


def _entries(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """llama.cpp's entry of each token."""
    known = choice.get("logprobs")
    entries = known.get("content") if isinstance(known, Mapping) else None
    return [x for x in entries if isinstance(x, Mapping)] if isinstance(entries, list) else []


def _tokenised(tokenizer: Any, text: Any) -> list[int]:
    """The ids of a text.

    Raises:
        ValueError: if there is none, or they stand for another text.
    """
    if not isinstance(text, str):
        raise ValueError("gives neither token ids nor a text")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.decode(ids) != text:
        raise ValueError(
            "gives no token ids, and the tokenizer of --model does not give its text back; vLLM from "
            "0.10.2, SGLang and llama-server give ids"
        )
    return ids


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _last(name: str) -> str:
    """A model's name without the folders of the machine that serves it."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name


def _shown(said: Any) -> str:
    """What a server says, fit for a terminal: one short line without control characters."""
    text = one_line(said) if isinstance(said, BaseException) else str(said)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 200 else f"{line[:197]}..."
