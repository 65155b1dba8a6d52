"""Which requests the page answers, and how much they may leave: without a server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='comes with Gradio: pip install -e ".[app]"')
from starlette.requests import ClientDisconnect

from latentflow.web import guard
from latentflow.web.guard import LARGEST_BODY, LARGEST_UPLOAD, Guard, Hosts, make_room

ONLY_HERE, EVERYBODY = Hosts("127.0.0.1", ["Draw.Example"]), Hosts("0.0.0.0", ["draw.example"])
MINUTE = 60.0


@pytest.mark.parametrize("listening", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2"])
def test_a_page_for_this_machine_alone_knows_only_its_names(listening) -> None:
    hosts = Hosts(listening)
    for name in ("localhost", "LOCALHOST:7860", "127.0.0.1", "127.0.0.1:7860", "[::1]", "[::1]:7860"):
        assert hosts.knows(name), name
    for name in ("evil.example", "localhost.evil.example", "10.0.0.1", "[2001:db8::1]:7860", "", ":7860"):
        assert not hosts.knows(name), name
    for name in ("localhost@evil.example", "evil.example@localhost", "localhost/evil", "local host", "::1"):
        assert not hosts.knows(name), name


def test_a_page_for_everybody_knows_addresses_and_its_own_names() -> None:
    for name in ("10.0.0.1", "10.0.0.1:7860", "[2001:db8::1]:7860", socket.gethostname(), "localhost"):
        assert EVERYBODY.knows(name), name
    assert not EVERYBODY.knows("evil.example")
    assert Hosts("my-server").knows("my-server:7860")


def test_further_names_are_those_that_were_allowed() -> None:
    for hosts in (ONLY_HERE, EVERYBODY):
        assert hosts.knows("draw.example") and hosts.knows("DRAW.example:443")
        assert not hosts.knows("www.draw.example")


def test_other_sites_are_told_by_their_origin() -> None:
    for origin in ("http://127.0.0.1:7860", "https://draw.example", "https://draw.example:8443"):
        assert ONLY_HERE.same_site(origin, "127.0.0.1:7860"), origin
    others = ("http://evil.example", "null", "", "http://127.0.0.1:8000", "http://[", "https://127.0.0.1")
    for origin in others:
        assert not ONLY_HERE.same_site(origin, "127.0.0.1:7860"), origin


def asked(
    headers: dict[str, str],
    method: str = "POST",
    path: str = "/gradio_api/queue/join",
    query: str = "",
    kind: str = "http",
    uploads: Path = Path("nowhere"),
    inner: Any = None,
) -> tuple[int, str]:
    """Return status and sentence of an answer; 200 where it comes from behind the guard."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body of what is refused is not read")

    async def page(scope: Any, receive: Any, send: Any) -> None:
        if inner is not None:
            inner(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b'{"detail": "drawn"}'})

    scope = {"type": kind, "path": path, "query_string": query.encode()}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    scope |= {"method": method} if kind == "http" else {}
    asyncio.run(Guard(page, hosts=ONLY_HERE, uploads=uploads, listeners=LISTENERS)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], sent[0]["reason"]
    return sent[0]["status"], json.loads(sent[1]["body"])["detail"]


LISTENERS: Counter[str] = Counter()
HERE = {"host": "127.0.0.1:7860", "content-length": "10"}


def test_no_stranger_s_name_is_answered() -> None:
    for path in ("/", "/gradio_api/queue/data", "/gradio_api/file=x.png", "/gradio_api/upload"):
        for method in ("GET", "HEAD", "POST"):
            status, sentence = asked(HERE | {"host": "evil.example\x1b[2J"}, method, path)
            assert status == 421
            assert "--allowed-host" in sentence and "evil.example\\x1b[2J" in sentence
            assert asked({"content-length": "10"}, method, path)[0] == 421  # none at all
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert asked(HERE | headers, kind="websocket", path="/ws")[0] == 1008


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({}, "/gradio_api/queue/join", 200),
        ({"origin": "http://127.0.0.1:7860"}, "/gradio_api/queue/join", 200),
        ({"origin": "http://evil.example"}, "/gradio_api/queue/join", 403),
        ({"origin": "null"}, "/gradio_api/upload", 403),
        ({"method": "GET", "origin": "http://evil.example"}, "/config", 403),
        ({"method": "GET", "origin": "http://127.0.0.1:7860"}, "/config", 200),
        ({"content-length": str(LARGEST_BODY)}, "/gradio_api/queue/join", 200),
        ({"content-length": str(LARGEST_BODY + 1)}, "/gradio_api/queue/join", 413),
        ({"content-length": "900000"}, "/gradio_api/call/generate", 413),
        ({"content-length": "900000"}, "/gradio_api/component_server", 200),
        ({"content-length": "5000000"}, "/gradio_api/component_server", 413),
        ({"content-length": str(LARGEST_UPLOAD)}, "/gradio_api/upload", 200),
        ({"content-length": str(2 * LARGEST_UPLOAD)}, "/gradio_api/upload", 413),
        ({"content-length": ""}, "/gradio_api/upload", 411),
        ({"content-length": "-1"}, "/gradio_api/queue/join", 411),
        ({}, "/gradio_api/file=https://example.com/x.png", 403),
    ],
)
def test_what_may_be_sent(headers, path, status, tmp_path) -> None:
    method = headers.get("method", "POST")
    assert asked(HERE | headers, method, path, uploads=tmp_path)[0] == status


def test_who_listens_is_known_while_the_answer_is_open() -> None:
    heard: list[dict[str, int]] = []
    for path, query in (
        ("/gradio_api/queue/data", "session_hash=me"),
        ("/gradio_api/call/v2/generate/me", ""),
    ):
        asked(HERE, "GET", path, query, inner=lambda scope: heard.append(dict(LISTENERS)))
    asked(HERE, "POST", "/gradio_api/call/generate", inner=lambda scope: heard.append(dict(LISTENERS)))
    assert heard == [{"me": 1}, {"me": 1}, {}]
    assert not LISTENERS


def kept(folder: Path, ages: dict[str, float], size: int = 100_000) -> None:
    for name, age in ages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "image.png").write_bytes(bytes(size))
        for path in (folder / name / "image.png", folder / name):
            os.utime(path, (time.time() - age,) * 2)


def test_the_oldest_uploads_make_room_and_young_ones_stay(tmp_path) -> None:
    kept(tmp_path, {"b": 3 * MINUTE, "a": 4 * MINUTE, "c": 2 * MINUTE, "d": 1})
    assert make_room(tmp_path, 400_000) == 400_000
    assert make_room(tmp_path, 250_000) == 200_000
    assert sorted(path.parent.name for path in tmp_path.rglob("*.png")) == ["c", "d"]
    assert make_room(tmp_path, 0) == 100_000  # d is young
    os.utime(tmp_path / "a", (0, 0))
    make_room(tmp_path, 0)
    assert not (tmp_path / "a").exists()  # nor do empty folders stay


def test_the_number_of_uploads_has_a_bound_too(tmp_path) -> None:
    kept(tmp_path, {str(i): 2 * MINUTE + i for i in range(20)}, size=1)
    make_room(tmp_path, 10 * 2**16)
    assert sorted(int(path.parent.name) for path in tmp_path.rglob("*.png")) == list(range(10))


def test_an_upload_for_which_there_is_no_room_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guard, "MOST_KEPT", 250_000)
    upload: dict[str, Any] = {"path": "/gradio_api/upload", "uploads": tmp_path}
    kept(tmp_path, {"a": 1, "b": 1})
    status, sentence = asked(HERE | {"content-length": "100000"}, **upload)
    assert status == 503 and "busy" in sentence
    os.utime(tmp_path / "a" / "image.png", (0, 0))
    assert asked(HERE | {"content-length": "100000"}, **upload)[0] == 200
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == ["b"]


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_a_window_that_is_closed_in_the_middle_of_a_request_is_no_defect(path, tmp_path) -> None:
    def request_fails_with(error: type[Exception]) -> None:
        def fail(scope: Any) -> None:
            raise error

        asked(HERE, path=path, uploads=tmp_path, inner=fail)

    with pytest.raises(IndexError):  # nothing was answered
        request_fails_with(ClientDisconnect)
    with pytest.raises(ZeroDivisionError):
        request_fails_with(ZeroDivisionError)
