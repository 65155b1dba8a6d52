"""A guard between the network and the page: it refuses requests, and limits how much they may store.

It knows only the paths of Gradio's requests, and nothing else of Gradio.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from asyncio import to_thread
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ..errors import printable, reason

MEBIBYTE = 2**20
LARGEST_UPLOAD = 32 * MEBIBYTE
#: Largest size in bytes of a request with files, by the end of its path. Others have a few hundred bytes.
LARGEST_BODIES = {"/upload": LARGEST_UPLOAD + MEBIBYTE, "/component_server": 4 * MEBIBYTE}
LARGEST_BODY = MEBIBYTE // 4
MOST_KEPT = 512 * MEBIBYTE  # of uploads and generated images together
SMALLEST_FILE = 2**16  # bytes that a file counts at least, which bounds the number of files too
YOUNG = 60.0  # seconds in which a file is not removed to make room

ARRIVED = "latentflow.arrived"  # key in a request's scope: its time of arrival by ``time.monotonic``

HERE = ("localhost", "127.0.0.1", "::1")


class Hosts:
    """The names under which the page is served.

    Another site can make its own name point to this machine (DNS rebinding), so that a browser lets it read the
    answers. Its requests still carry that name, and are refused. If the page is open to other machines, any numeric
    address is accepted, since no such site can have one.

    Args:
        listening: address or name that the server listens on.
        allowed: further names, such as that of a reverse proxy.
    """

    def __init__(self, listening: str, allowed: Sequence[str] = ()) -> None:
        self._allowed = {name.lower().strip("[]") for name in allowed}
        self._names = {*HERE, *self._allowed}
        self.only_here = is_loopback(listening)
        if not self.only_here:
            self._names |= {listening.lower(), socket.gethostname().lower()}

    def knows(self, host: str) -> bool:
        """Return whether a Host header names the page, whatever the port."""
        name = _name(host)
        return name in self._names or (not self.only_here and name is not None and _is_address(name))

    def same_site(self, origin: str, host: str) -> bool:
        """Return whether an Origin header is the page itself, or an allowed name."""
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return netloc != "" and (netloc == host.lower() or _name(netloc) in self._allowed)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    name = host.lower().strip("[]")
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str | None:
    """Return a Host header without port and brackets, in lower case; None if it is invalid."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@\s]+))(?::\d+)?", host.lower())
    return (match[1] or match[2]) if match else None


class Guard:
    """ASGI middleware that refuses unknown host names, requests from other sites, and large requests.

    It also counts who listens for an answer, so that the page can end a request whose client has left.

    Args:
        uploads: folder in which files of requests are stored, at most about ``MOST_KEPT`` bytes.
        listeners: number of open streams by session or event, which is kept up to date here.
    """

    def __init__(self, app: ASGIApp, *, hosts: Hosts, uploads: Path, listeners: Counter[str]) -> None:
        self._app, self._hosts, self._uploads, self._listeners = app, hosts, uploads, listeners
        self._incoming = 0  # bytes of uploads that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        with suppress(ClientDisconnect):  # the window was closed meanwhile
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal(scope):
            await _refuse(scope, receive, send, *refusal)
        elif scope.get("method") == "POST" and scope["path"].endswith(tuple(LARGEST_BODIES)):
            await self._take_upload(scope, receive, send)
        else:
            scope[ARRIVED] = time.monotonic()
            listener = _listener(scope)
            if listener is not None:
                self._listeners[listener] += 1
            try:
                await self._app(scope, receive, send)
            except (TypeError, KeyError) as error:
                if scope.get("method") != "POST" or "/call/v2/" not in scope["path"]:
                    raise
                # Gradio raises these for an argument whose name is wrong or missing.
                message = f"The request is not understood: {reason(error)}"
                await _refuse(scope, receive, send, 422, message)
            finally:
                if listener is not None:
                    self._listeners -= Counter([listener])

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and message for a request that is refused, else None."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._hosts.knows(hosts[0]):
            shown = printable(", ".join(hosts))[:100]
            return (
                421,
                f"This page is not served as '{shown}'. Start it with --allowed-host NAME if it should be.",
            )
        if re.search(r"/file=\w\w+:/", scope["path"]):
            return 403, "Nothing is fetched from other addresses."
        if "origin" in headers and not self._hosts.same_site(headers["origin"], hosts[0]):
            return 403, "This request comes from the page of another site."
        if scope.get("method") != "POST":
            return None
        if not headers.get("content-length", "").isdecimal():
            return 411, "The length of the request is missing."
        most = next((n for end, n in LARGEST_BODIES.items() if scope["path"].endswith(end)), LARGEST_BODY)
        if int(headers["content-length"]) > most:
            return 413, f"The request is too large: at most {most:,} bytes."
        return None

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = max(SMALLEST_FILE, int(Headers(scope=scope)["content-length"]))
        self._incoming += size
        try:
            kept = await to_thread(make_room, self._uploads, MOST_KEPT - self._incoming)
            if kept + self._incoming > MOST_KEPT:
                busy = "The server is busy: too many uploads. Try again in a minute."
                await _refuse(scope, receive, send, 503, busy)
            else:
                await self._app(scope, receive, send)
        finally:
            self._incoming -= size


def make_room(folder: Path, most: int) -> int:
    """Remove a folder's oldest files until the others have at most ``most`` bytes; return their size in bytes.

    Files younger than ``YOUNG`` seconds stay, whatever their size.
    """
    now, files = time.time(), []
    for parent, folders, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                status = os.lstat(Path(parent, name))
                files.append((status.st_mtime, max(SMALLEST_FILE, status.st_size), Path(parent, name)))
        if not folders and not names and parent != str(folder):
            with suppress(OSError):
                if os.lstat(parent).st_mtime < now - YOUNG:
                    Path(parent).rmdir()
    kept = sum(size for _, size, _ in files)
    for modified, size, path in sorted(files):
        if kept <= most or modified > now - YOUNG:
            break
        with suppress(OSError):  # removed meanwhile, or in use
            path.unlink()
            kept -= size
    return kept


def _listener(scope: Scope) -> str | None:
    """Return the session or event for whose answer a request waits, or None."""
    path: str = scope["path"]
    if scope.get("method") != "GET":
        return None
    if path.endswith("/queue/data"):
        return QueryParams(scope["query_string"]).get("session_hash", "")
    return path.rpartition("/")[2] if "/call/" in path else None


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, sentence: str) -> None:
    answer: ASGIApp = WebSocketClose(code=1008, reason=sentence)
    if scope["type"] == "http":
        answer = JSONResponse({"detail": sentence}, status, {"connection": "close"})  # its body is not read
    await answer(scope, receive, send)
