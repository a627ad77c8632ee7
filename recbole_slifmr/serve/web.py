"""The page and the JSON of ``slifmr serve``: FastAPI around :class:`~recbole_slifmr.serve.lookup.Lookup`.

Nothing is written, and nothing but the model is run for a request. Requests are bounded: headers of at most 16 KB, no
body, every text and number with a limit, an answer within a number of seconds. Nothing that a client sent is sent back
in an error.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import psutil
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recbole_slifmr import __version__
from recbole_slifmr.errors import SettingError
from recbole_slifmr.serve.lookup import IMAGE_TYPES, Found, Item, Lookup, Ranked, UnknownError, UserHistory

PAGE = Path(__file__).with_name("page.html")
MAX_K, MAX_TEXT, MAX_REQUEST, MAX_CONNECTIONS, WORKERS = 100, 200, 16_384, 64, 2

Token = Annotated[str, Query(min_length=1, max_length=MAX_TEXT)]
Text = Annotated[str, Query(max_length=MAX_TEXT)]
Number = Annotated[int, Query(ge=1, le=MAX_K)]
Offset = Annotated[int, Query(ge=0, le=10_000_000)]
Share = Annotated[float, Query(ge=0, le=1)]


@dataclass(frozen=True)
class Problem:
    """Why there is no answer, in one line."""

    error: str


def _problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


def security_headers(page: str, other_images: bool) -> dict[str, str]:
    """Return the headers of every response: a browser runs and shows what is in the page and nothing else.

    Args:
        page: whose one script and one style are let through by their hashes.
        other_images: whether images come from any https address.
    """
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        f"img-src 'self'{' https:' if other_images else ''}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }


class Traffic:
    """How many requests there were and how long they took."""

    def __init__(self) -> None:
        self.counts = defaultdict[tuple[str, int], int](int)
        self.seconds = defaultdict[str, float](float)

    def text(self) -> str:
        """Return it, and the memory of the process, in the text format of Prometheus."""
        lines = ["# TYPE slifmr_requests_total counter"]
        for (path, status), count in sorted(self.counts.items()):
            lines.append(f'slifmr_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE slifmr_request_seconds_total counter")
        for path, seconds in sorted(self.seconds.items()):
            lines.append(f'slifmr_request_seconds_total{{path="{path}"}} {seconds:.6f}')
        memory = psutil.Process().memory_info().rss
        return "\n".join([*lines, "# TYPE slifmr_resident_bytes gauge", f"slifmr_resident_bytes {memory}", ""])


def refuse(scope: Scope) -> Response | None:
    """Return the response to a request that is too large or has a body, None to others."""
    given = dict(scope["headers"])
    if given.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in given:
        return _problem(413, "a request has no body here")
    size = len(scope["path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"])))
    return _problem(431, f"a request has at most {MAX_REQUEST} bytes here") if size > MAX_REQUEST else None


class Guard:
    """Middleware: refuses requests that are too large, adds headers to responses, counts and times them.

    Args:
        app: what it stands before.
        headers: for every response that has not got them.
        paths: that are counted by name; all others are counted together.
        traffic: where they are counted.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], paths: Iterable[str], traffic: Traffic) -> None:
        self.app, self.paths, self.traffic = app, set(paths), traffic
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path, start, status = scope["path"] if scope["path"] in self.paths else "other", perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, there = message["status"], {name.lower() for name, _ in message["headers"]}
                own = [header for header in self.headers if header[0] not in there]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            await (refuse(scope) or self.app)(scope, receive, send_with_headers)
        finally:
            self.traffic.counts[path, status] += 1
            self.traffic.seconds[path] += perf_counter() - start


def make_app(
    lookup: Lookup,
    images: Mapping[str, Path] | None = None,
    hosts: Sequence[str] = ("*",),
    timeout: float = 10.0,
) -> FastAPI:
    """Return the application.

    Args:
        lookup: answers the questions.
        images: image files by item token.
        hosts: names by which the server may be called. Other ``Host`` headers are refused, so that a foreign page
            cannot reach a server on this machine by giving a name of its own this machine's address.
        timeout: seconds after which a question is given up.
    """
    pool, page, traffic = ThreadPoolExecutor(WORKERS, "answer"), PAGE.read_text(encoding="utf-8"), Traffic()
    headers = security_headers(page, other_images=not images and bool(lookup.images))

    async def answer(question: Callable[..., Any], *arguments: Any) -> Any:
        future = asyncio.get_running_loop().run_in_executor(pool, question, *arguments)
        return await asyncio.wait_for(future, timeout)

    async def fail(request: Request, error: Any) -> Response:
        if isinstance(error, UnknownError):
            return _problem(404, str(error))
        if isinstance(error, TimeoutError):
            return _problem(503, f"no answer within {timeout:g} s: try again", {"retry-after": "5"})
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            return _problem(422, f"{first['loc'][-1]}: {first['msg']}")
        if isinstance(error, HTTPException):
            return _problem(error.status_code, error.detail, error.headers)
        return _problem(500, "the server failed; its terminal says why", headers)  # it does not pass the guard

    failures: tuple[type[Exception], ...] = (
        UnknownError, TimeoutError, RequestValidationError, HTTPException, Exception
    )  # fmt: skip
    app = FastAPI(
        redirect_slashes=False,
        title="slifmr serve", version=__version__, docs_url=None, redoc_url=None,  # their scripts are on a network
        exception_handlers=dict.fromkeys(failures, fail),
        responses={status: {"model": Problem} for status in (404, 422, 503)},
    )  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, media_type="text/html")

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        """Say what is served."""
        return lookup.about()

    @app.get("/api/search")
    async def search(q: Text = "", limit: Number = 20) -> Found:
        """Find users by id and items by id or title; all words must occur."""
        return await answer(lookup.search, q, limit)

    @app.get("/api/user")
    async def user(user: Token, limit: Number = 20, offset: Offset = 0) -> UserHistory:
        """Return a user with items of all splits, the most popular first."""
        return await answer(lookup.user, user, limit, offset)

    @app.get("/api/item")
    async def item(item: Token) -> Item:
        """Return an item."""
        return lookup.item(item)

    @app.get("/api/recommend")
    async def recommend(user: Token, k: Number = 10, popularity: Share = 0, explain: bool = False) -> list[Ranked]:
        """Return the best items that a user has not got: by the model's score, or mixed with popularity."""
        return await answer(lookup.recommend, user, k, popularity, explain)

    @app.get("/api/similar")
    async def similar(item: Token, k: Number = 10) -> list[Ranked]:
        """Return the items nearest to an item by cosine."""
        return await answer(lookup.similar, item, k)

    @app.get("/image", include_in_schema=False)
    async def image(item: Token) -> Response:
        file = (images or {}).get(item)
        if file is None or not file.is_file():
            raise UnknownError("there is no such image")
        kind = IMAGE_TYPES[file.suffix.lower()]
        return FileResponse(file, media_type=kind, headers={"cache-control": "max-age=3600"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return counts and seconds of requests and the memory, in the text format of Prometheus."""
        return Response(traffic.text(), media_type="text/plain; version=0.0.4")

    paths = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard, headers=headers, paths=paths, traffic=traffic)
    return app


def bind(host: str, port: int) -> socket.socket:
    """Take an address; nobody can connect yet.

    Raises:
        SettingError: if it cannot be had.
    """
    try:
        # With the protocol named, asyncio sends small answers at once (TCP_NODELAY).
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would take a port from another program
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(f"{host}:{port} cannot be listened on: {reason}; try --port=0") from error
    return listener


def run_app(app: FastAPI, listener: socket.socket) -> None:
    """Serve until the process is asked to stop."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http="h11", ws="none", lifespan="off",
        limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_REQUEST, timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
