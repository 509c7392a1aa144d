"""``--server``: sampling from a server of completions, a stand-in; test_vllm_real.py has real ones."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from completions_server import StandIn, serving
from pipeline import contents
from tiny import save, tiny_model, tiny_tokenizer

from topr_kernels.recipe import SettingsError, read_records
from topr_kernels.recipe.cli import main
from topr_kernels.recipe.generate import stop_token_ids
from topr_kernels.recipe.processes import Processes
from topr_kernels.recipe.settings import GenerateSettings

server = importlib.import_module("topr_kernels.recipe.server")
COMMON = [
    *("--questions", "8", "--held-out", "2", "--max-new-tokens", "6", "--sample-batch", "6"),
    *("--task", "chain_sum"),
    *("--task-config", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys or proxies of whoever runs the tests, and no waiting."""
    for name in ("TOPR_SERVER_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "_WAITS", (0.0, 0.0))


def sampling(model: Path, url: str, out: Path, *more: str) -> list[str]:
    argv = ["generate", "--model", str(model), *COMMON, "--samples", "3", "--server", url]
    return [*argv, "--out", str(out), *more]


def figures(out: Path) -> dict[str, Any]:
    return dict(json.loads(Path(f"{out}.json").read_text())["figures"])


def said(warned: pytest.WarningsRecorder) -> list[str]:
    """Warnings of the server."""
    return [text for w in warned if (text := str(w.message)).startswith("--server")]


def test_a_server_samples_and_mu_is_scored_here(
    stand_in: StandIn, model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    out, scored = tmp_path / "samples.parquet", tmp_path / "scored.parquet"
    assert main(sampling(model, f"{stand_in.url}/v1/", out)) == 0
    records = read_records(out)
    assert len(records) == 24 and {r.finish_reason for r in records} == {"stop", "length"}
    # The server's log-probabilities are no mu, and nobody knows what it computes in.
    assert all((r.behavior_log_prob, r.behavior_source) == (None, "") for r in records)
    assert {r.sampling.dtype for r in records} == {""} and not said(recwarn)
    # From the whole softmax, of ids of our tokenizer, each answer by a seed of its own.
    known = {
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "samplers": ["temperature"]},
        **{"model": "/models/of/the/server/tiny", "temperature": 1.0, "max_tokens": 6},
        "stop_token_ids": stop_token_ids(tiny_tokenizer()),
    }
    assert all({name: body[name] for name in known} == known for body in stand_in.asked)
    prompts = {tuple(tiny_tokenizer()(r.prompt)["input_ids"]) for r in records}
    assert {tuple(body["prompt"]) for body in stand_in.asked} == prompts
    # Two distinct prompts of the first batch were compared.
    assert len({body["seed"] for body in stand_in.asked[2:]}) == 24 == len(stand_in.asked) - 2
    assert main(["score", "--model", str(model), "--records", str(out), "--out", str(scored)]) == 0
    assert {r.behavior_source for r in read_records(scored)} == {"score"}
    # Neither where the server is, nor where its model lies.
    manifest = Path(f"{out}.json").read_text()
    assert "127.0.0.1" not in manifest and "/models/of" not in manifest
    assert json.loads(manifest)["settings"]["backend"] == "server"
    assert figures(out)["server"] == {
        **{"model": "tiny", "software": "vllm", "version": "0.32.0"},
        **{"token_ids": "of the server", "log_prob_difference": 0.0},
    }
    # Finished: nobody is asked.
    assert main(sampling(model, "http://127.0.0.1:1", out)) == 0


def test_what_a_server_does_not_know_changes_no_record(
    stand_in: StandIn, model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    outs = {name: tmp_path / f"{name}.parquet" for name in ("vllm", "llamacpp", "text")}
    assert main(sampling(model, stand_in.url, outs["vllm"])) == 0
    with serving("llamacpp") as other:
        other.version = ""
        other.models = [{"id": "tiny.gguf", "owned_by": "llamacpp", "meta": {"n_ctx": 300}}]
        assert main(sampling(model, other.url, outs["llamacpp"])) == 0
        # It runs on after a line: what follows is cut off, as where it had ended.
        assert "\n" in {r.completion[-1:] for r in read_records(outs["llamacpp"])}
        long = sampling(model, other.url, tmp_path / "long.parquet", "--max-new-tokens", "300")
        assert main(long) == 2
    assert not said(recwarn)
    with serving("text") as other:
        assert main(sampling(model, other.url, outs["text"])) == 0
    no_ids, no_log_probs = said(recwarn)
    assert "gives no token ids, so those of every record are of its text" in no_ids
    assert "gives no log-probabilities, so nothing shows that its model" in no_log_probs
    assert figures(outs["text"])["server"]["token_ids"] == "of its text"
    assert figures(outs["text"])["server"]["log_prob_difference"] is None
    # A token per character: here the ids of a text are those that were sampled.
    one, *others = ([r.completion_token_ids for r in read_records(out)] for out in outs.values())
    assert others == [one, one]


def test_a_run_that_failed_goes_on_at_another_port_to_the_same_bytes(
    stand_in: StandIn, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(sampling(model, stand_in.url, tmp_path / "whole" / "samples.parquet")) == 0
    out = tmp_path / "killed" / "samples.parquet"
    with serving() as other:
        # After two of four batches.
        other.hold = lambda: len(other.asked) < 14 or other.instead.append((500, {}, b"no memory"))
        assert main(sampling(model, other.url, out)) == 2
        assert "refused (HTTP 500): no memory; its own messages tell why" in capsys.readouterr().err
        assert len(list(tmp_path.glob("killed/.*/parts/*.parquet"))) == 2
    with serving() as other:
        other.version = "0.33.0"
        assert main(sampling(model, other.url, out)) == 2
        assert (
            "batches that are done: version '0.32.0' then, '0.33.0' now" in capsys.readouterr().err
        )
    with serving() as other:
        assert main(sampling(model, other.url, out)) == 0
        # Two batches, and what was compared.
        assert len(other.asked) == 12 + 2
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_a_server_measures_as_well(stand_in: StandIn, model: Path, tmp_path: Path):
    out = tmp_path / "evaluation.json"
    argv = ["evaluate", "--model", str(model), *COMMON, "--eval-samples", "4", "--votes", "2"]
    assert main([*argv, "--server", stand_in.url, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["figures"]
    assert found["samples"] == 4 and found["server"]["model"] == "tiny"


def test_a_busy_server_is_asked_again(stand_in: StandIn, model: Path, tmp_path: Path, capsys: Any):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    assert main(sampling(model, stand_in.url, one)) == 0
    busy = [(status, {"Retry-After": "0"}, b"") for status in (429, 503)]

    # Several are asked for at once: the first to be the thirtieth makes the server busy for two of them.
    lock, waiting = threading.Lock(), [30]

    def sometimes() -> None:
        with lock:
            if waiting and len(stand_in.asked) >= waiting[0]:
                waiting.pop()
                stand_in.once = list(busy)

    stand_in.hold = sometimes
    assert main(sampling(model, stand_in.url, other)) == 0
    assert not stand_in.once
    assert one.read_bytes() == other.read_bytes() and len(stand_in.asked) > 2 * 26
    stand_in.hold, stand_in.instead = lambda: None, busy[:1]
    asked = len(stand_in.asked)
    assert main(sampling(model, stand_in.url, tmp_path / "third.parquet")) == 2
    assert "too busy (HTTP 429, asked 3 times); try later, or with a smaller --sample-batch" in (
        capsys.readouterr().err
    )
    # Two prompts are compared.
    assert len(stand_in.asked) - asked <= 2 * 3
    assert list(tmp_path.iterdir()).count(tmp_path / "third.parquet") == 0


def chosen(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda choice: choice.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (chosen(token_ids=[5, 102]), "gives the token id 102, but --model has 102 ids"),
        (chosen(token_ids=[5, -1], text=None), "gives neither token ids nor a text"),
        (chosen(token_ids=[5, 5]), "ended a completion (length) after 2 of 6 tokens, the last of"),
        (chosen(token_ids=[5] * 7), "ended a completion (length) after 7 of 6 tokens"),
        (chosen(token_ids=[]), "ended a completion (length) after 0 of 6 tokens"),
        (chosen(token_ids=None, text="1" * 13), "ended a completion (length) after 13 of 6 tokens"),
        (chosen(prompt_token_ids=[0, 5]), "completed other token ids than it was given"),
        (chosen(finish_reason="abort"), "for the reason 'abort'; expected 'stop' or 'length'"),
        (chosen(finish_reason=None), "for the reason 'None'; expected 'stop' or 'length'"),
    ],
)
def test_what_no_sampler_of_the_model_says_is_refused(
    stand_in: StandIn,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    message: str,
):
    stand_in.change = lambda choice: (
        choice.update(finish_reason="length"),
        change(choice),
    )
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"topr: --server {stand_in.url}: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, b"<html>"), "/v1/completions does not answer in JSON; give the URL of"),
        ((200, {}, b"[" * 100_000), "/v1/completions does not answer in JSON"),
        ((200, {}, b"{}"), "answers without a completion"),
        ((200, {}, b'{"choices": [1]}'), "answers without a completion"),
        ((200, {}, b" " * (2 << 20)), "an answer of more than "),
        (
            (302, {"Location": "http://evil.test/"}, b""),
            "redirects to http://evil.test/, which is not",
        ),
        ((401, {}, b""), "wants a key (HTTP 401); set TOPR_SERVER_KEY"),
        ((404, {}, b""), "has no /v1/completions"),
        (
            (422, {}, b"prompt:\n\x1b[31m a text"),
            "refused (HTTP 422): prompt: [31m a text; expected one that takes prompts as token ids",
        ),
    ],
)
def test_a_server_that_refuses_is_told_in_a_line(
    stand_in: StandIn,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: Any,
    message: str,
):
    stand_in.instead = [answer]
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"topr: --server {stand_in.url}: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_told(
    stand_in: StandIn,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(sampling(model, url, tmp_path / "samples.parquet")) == 2
        assert (
            "cannot be reached ([Errno 111] Connection refused); start" in capsys.readouterr().err
        )
        # Connects, and is never served.
        taken.listen()
        monkeypatch.setattr(server, "_SHORT_PATIENCE", 0.2)
        assert main(sampling(model, url, tmp_path / "samples.parquet")) == 2
        assert "no answer in 0 s; a smaller --sample-batch" in capsys.readouterr().err
    monkeypatch.setattr(server, "_PATIENCE", 0.2)
    monkeypatch.setattr(server, "_PER_TOKEN", 0.0)
    over = threading.Event()
    stand_in.hold = lambda: over.wait(30)
    began = time.monotonic()
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 2
    assert "no answer in 0 s" in capsys.readouterr().err and time.monotonic() < began + 20
    over.set()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "/v1/models names no model"),
        (
            [{"id": "a"}, {"id": "b\x1b[2J"}],
            "serves 2 models (a, b [2J); expected one, or one named ",
        ),
    ],
)
def test_a_server_must_serve_one_model_or_that_of_the_name(
    stand_in: StandIn, model: Path, tmp_path: Path, capsys: Any, models: Any, message: str
):
    stand_in.models = models
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 2
    assert message in capsys.readouterr().err
    stand_in.models = [{"id": "a"}, {"id": "hub/tiny"}]
    assert server.served(server.Server(stand_in.url), str(model)).name == "hub/tiny"
    stand_in.models = [{"id": "anything"}]
    assert server.served(server.Server(stand_in.url), str(model)).positions is None


def test_a_prompt_without_room_on_the_server_is_refused_before_it_is_asked(
    stand_in: StandIn, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stand_in.models[0]["max_model_len"] = 10
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 2
    assert "the sampler has room for 10 together" in capsys.readouterr().err and not stand_in.asked


def test_a_server_of_another_policy_is_warned_of(
    stand_in: StandIn, model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    def other_policy(choice: dict[str, Any]) -> None:
        known = choice["logprobs"]["token_logprobs"]
        choice["logprobs"]["token_logprobs"] = [x - 0.25 for x in known]

    stand_in.change = other_policy
    out = tmp_path / "samples.parquet"
    assert main(sampling(model, stand_in.url, out, "--temperature", "0.7")) == 0
    (text,) = said(recwarn)
    assert (
        "differ from those of --model by 0.25 nats on average, so it samples from another" in text
    )
    assert figures(out)["server"]["log_prob_difference"] == pytest.approx(0.25, abs=1e-3)
    # Compared at temperature 1, whatever is sampled at.
    assert [body["temperature"] for body in stand_in.asked] == [1.0] * 2 + [0.7] * 24


def test_log_probabilities_that_are_none_are_no_news(
    stand_in: StandIn, model: Path, tmp_path: Path
):
    for value in ([float("nan")] * 6, ["x"] * 6, [0.0], None):
        stand_in.change = chosen(logprobs={"token_logprobs": value})
        out = tmp_path / f"{value}.parquet"
        with pytest.warns(UserWarning, match="gives no log-probabilities"):
            assert main(sampling(model, stand_in.url, out, "--sample-batch", "99")) == 0


def test_the_key_goes_where_nobody_else_reads_it(
    stand_in: StandIn, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("TOPR_SERVER_KEY", "sesame")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    # Nor does a proxy come between, which would read it.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    out = tmp_path / "samples.parquet"
    assert main(sampling(model, stand_in.url, out)) == 0
    assert {headers["Authorization"] for headers in stand_in.headers} == {"Bearer sesame"}
    told = capsys.readouterr()
    assert "sesame" not in Path(f"{out}.json").read_text() + told.out + told.err
    # Another machine, by way of a proxy: in the open, so said; and not what is for another server.
    monkeypatch.setenv("http_proxy", stand_in.url)
    stand_in.headers.clear()
    with pytest.warns(UserWarning, match="TOPR_SERVER_KEY is sent to another machine over plain"):
        server.Server("http://model.test:8000").ask("/v1/models")
    monkeypatch.delenv("TOPR_SERVER_KEY")
    server.Server("http://model.test:8000").ask("/v1/models")
    assert [h.get("Authorization") for h in stand_in.headers] == ["Bearer sesame", None]
    assert stand_in.paths[-1] == "http://model.test:8000/v1/models"
    assert (
        server.Server("https://model.test")._key == server.Server("http://[::1]")._key == "another"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(
        SettingsError, match="OPENAI_API_KEY: holds characters that no header"
    ) as told:
        server.Server("https://model.test")
    assert "a\nb" not in str(told.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--server", "127.0.0.1:8000"],
            "server: got '127.0.0.1:8000'; expected a URL such as http",
        ),
        (["--server", "http://"], "server: got 'http://'; expected a URL"),
        (["--server", "http://h/v1?key=x"], "expected a URL"),
        (["--server", "http://me:secret@h"], "server: got a URL with a name or a key before an @"),
        (["--backend", "vllm"], "with the backend 'vllm'; leave one of them out"),
        (["--engine", "max_num_seqs=2"], "with the backend 'server', which takes none"),
        (["--temperature", "0.009"], "with the backend 'server', which, if it is vLLM, samples"),
        (["--server", "", "--backend", "server"], "backend: got 'server' without --server"),
    ],
)
def test_settings_that_no_server_takes_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    argv = sampling(model, "http://127.0.0.1:1", tmp_path / "samples.parquet", *more)
    for again in ([], ["--dry-run"]):
        assert main([*argv, *again]) == 2
        error = capsys.readouterr().err
        assert message in error and "secret" not in error
    assert not list(tmp_path.iterdir())


def test_iterate_takes_no_server(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["iterate", "--model", str(model), "--server", "http://127.0.0.1:1"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "which a server does not have. Run generate --server, score," in capsys.readouterr().err


def test_a_server_is_of_one_process(monkeypatch: pytest.MonkeyPatch):
    sampling_module = importlib.import_module("topr_kernels.recipe.sampling")
    settings = GenerateSettings(model="some/model", server="http://127.0.0.1:1")
    assert sampling_module.with_backend(settings).backend == "server"
    monkeypatch.setattr(sampling_module, "current", lambda: Processes(0, 2))
    with pytest.raises(SettingsError, match="backend: got 'server' in 2 processes"):
        sampling_module.with_backend(dataclasses.replace(settings))


def test_all_of_a_batch_is_asked_for_at_once(stand_in: StandIn, model: Path, tmp_path: Path):
    # Two that are compared, then six; a request that came alone would wait in vain.
    together = [threading.Barrier(2, timeout=20), threading.Barrier(6, timeout=20)]
    order = iter([together[0]] * 2 + [together[1]] * 24)
    stand_in.hold = lambda: next(order).wait()
    assert main(sampling(model, stand_in.url, tmp_path / "samples.parquet")) == 0


def test_neither_an_error_nor_an_interrupt_waits_for_the_others(request: pytest.FixtureRequest):
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    over = threading.Event()

    def refused(i: int) -> None:
        if i == 3:
            raise SettingsError("no")
        over.wait(60)

    def interrupted(i: int) -> None:
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(60)

    began = time.monotonic()
    for work, error in ((refused, SettingsError), (interrupted, KeyboardInterrupt)):
        with pytest.raises(error):
            server.in_parallel(work, 5)
    assert time.monotonic() < began + 20
    over.set()
    assert server.in_parallel(lambda i: i * i, 600) == [i * i for i in range(600)]


def test_a_connection_that_breaks_is_made_again(stand_in: StandIn, model: Path, tmp_path: Path):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    assert main(sampling(model, stand_in.url, one)) == 0
    # Of three tries at most two.
    breaks = [True] * 2

    def break_some() -> None:
        if breaks:
            breaks.pop()
            raise ConnectionAbortedError

    stand_in.hold = break_some
    assert main(sampling(model, stand_in.url, other)) == 0
    assert not breaks and one.read_bytes() == other.read_bytes()
