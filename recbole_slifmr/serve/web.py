"""The page and the JSON of ``slifmr serve``: FastAPI around :class:`~recbole_slifmr.serve.lookup.Lookup`.

Nothing is written and nothing is run for a request but the model. Requests are bounded: a path and headers of at most
16 KB, no body, every number and text with a limit, a number of connections, a number of seconds. Whatever a client
sent is never sent back to it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from recbole_slifmr.serve.lookup import (
    IMAGE_TYPES,
    About,
    Found,
    Item,
    Lookup,
    Recommended,
    Similar,
    UnknownError,
    User,
)

PAGE = Path(__file__).with_name("page.html")
MAX_K, MAX_TEXT, MAX_HEADERS, MAX_CONNECTIONS, WORKERS = 100, 200, 16_384, 64, 2

Token = Annotated[str, Query(min_length=1, max_length=MAX_TEXT)]
Text = Annotated[str, Query(max_length=MAX_TEXT)]
Number = Annotated[int, Query(ge=1, le=MAX_K)]
Offset = Annotated[int, Query(ge=0, le=10_000_000)]
Share = Annotated[float, Query(ge=0, le=1)]


@dataclass(frozen=True)
class Problem:
    """Why there is no answer, in one line."""

    error: str


def _problem(status: int, text: str, **headers: str) -> JSONResponse:
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

    def add(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.counts[path, status] += 1
        self.seconds[path] += seconds

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


class Guard:
    """Middleware: refuses requests with a body, adds headers to responses, counts and times them.

    Args:
        app: what it stands before.
        headers: for every response that has not got them.
        paths: that are counted by name; all others are counted together.
        traffic: where they are counted.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], paths: Sequence[str], traffic: Traffic) -> None:
        self.app, self.paths, self.traffic = app, set(paths), traffic
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, start, status = scope["path"] if scope["path"] in self.paths else "other", perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, there = message["status"], {name.lower() for name, _ in message["headers"]}
                own = [header for header in self.headers if header[0] not in there]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        sent = dict(scope["headers"])
        has_body = sent.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in sent
        try:
            app = _problem(413, "a request has no body here") if has_body else self.app
            await app(scope, receive, send_with_headers)
        finally:
            self.traffic.add(path, status, perf_counter() - start)


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
        hosts: names by which the server may be called; other ``Host`` headers are refused, so that no foreign page
            reaches a server on this machine by a name of its own.
        timeout: seconds after which a question is given up.
    """
    app = FastAPI(
        title="slifmr serve", version=__version__, docs_url=None, redoc_url=None,  # their scripts are on a network
        responses={status: {"model": Problem} for status in (404, 422, 503)},
    )  # fmt: skip
    pool, page = ThreadPoolExecutor(WORKERS, "answer"), PAGE.read_text(encoding="utf-8")
    traffic = Traffic()

    async def answer(question: Callable[..., Any], *arguments: Any) -> Any:
        future = asyncio.get_running_loop().run_in_executor(pool, question, *arguments)
        return await asyncio.wait_for(future, timeout)

    @app.exception_handler(UnknownError)
    async def unknown(request: Request, error: Exception) -> Response:
        return _problem(404, str(error))

    @app.exception_handler(TimeoutError)
    async def too_long(request: Request, error: Exception) -> Response:
        return _problem(503, f"no answer within {timeout:g} s: try again", **{"retry-after": "5"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return _problem(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Any) -> Response:
        return _problem(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _problem(500, "the server failed; its terminal says why")

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, media_type="text/html")

    @app.get("/api/about")
    async def about() -> About:
        """Say what is served."""
        return lookup.about()

    @app.get("/api/search")
    async def search(q: Text = "", limit: Number = 20) -> Found:
        """Find users by id and items by id or title; all words must occur."""
        return await answer(lookup.search, q, limit)

    @app.get("/api/user")
    async def user(user: Token) -> User:
        """Return a user."""
        return lookup.user(user)

    @app.get("/api/item")
    async def item(item: Token) -> Item:
        """Return an item."""
        return lookup.item(item)

    @app.get("/api/history")
    async def history(user: Token, limit: Number = 20, offset: Offset = 0) -> list[Item]:
        """Return the items of a user in all splits, the most popular first."""
        return await answer(lookup.history, user, limit, offset)

    @app.get("/api/recommend")
    async def recommend(user: Token, k: Number = 10, popularity: Share = 0, explain: bool = False) -> list[Recommended]:
        """Return the best items that a user has not got: by the model's score, or mixed with popularity."""
        return await answer(lookup.recommend, user, k, popularity, explain)

    @app.get("/api/similar")
    async def similar(item: Token, k: Number = 10) -> list[Similar]:
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
        """Return counts and seconds of requests and the memory in the text format of Prometheus."""
        return Response(traffic.text(), media_type="text/plain; version=0.0.4")

    paths = [route.path for route in app.routes if hasattr(route, "path")]
    headers = security_headers(page, other_images=not images and bool(lookup.images))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard, headers=headers, paths=paths, traffic=traffic)
    return app


def run_app(app: FastAPI, listener: socket.socket) -> None:
    """Serve until the process is asked to stop."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http="h11", ws="none", lifespan="off",
        limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEADERS, timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
