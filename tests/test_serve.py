"""The page of ``slifmr serve`` and its JSON, asked as a browser asks; the numbers are those of ``slifmr recommend``."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import pandas as pd
import pytest
from conftest import QUIET, write_table, write_tiny

pytest.importorskip("fastapi", reason="the page needs the extra 'serve'")

from recbole_slifmr.cli import main
from recbole_slifmr.errors import DataError
from recbole_slifmr.serve.lookup import Lookup, read_image_urls
from recbole_slifmr.serve.names import ItemColumns
from recbole_slifmr.serve.sentence import sentence
from recbole_slifmr.serve.trained import load_trained
from recbole_slifmr.serve.web import PAGE, make_app, security_headers
from recbole_slifmr.training.experiment import run

EVIL = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
EVIL_USER = "<b>u3</b>"
TITLES = {"i0": "The Last Bus", "i1": "Bus Stop", "i2": "Last Train to the Bus", "i3": EVIL, "i4": "Ünder", "i7": "i70"}


def title_of(item):
    return TITLES.get(item, f"Film {item}")


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny set with titles, one of them and one user hostile; and images of two items."""
    folder = tmp_path_factory.mktemp("served")
    data = write_tiny(folder)
    pairs = data / "tiny.inter"
    pairs.write_text(re.sub(r"^u3\t", f"{EVIL_USER}\t", pairs.read_text(), flags=re.MULTILINE))
    rows = [(f"i{i}", title_of(f"i{i}"), 1990 + i, f"{'https' if i % 2 else 'javascript'}://a.example/{i}.jpg")
            for i in range(15)]  # fmt: skip
    write_table(data / "tiny.item", "item_id:token\ttitle:token_seq\tyear:token\tposter:token", rows)
    (folder / "images").mkdir()
    for name in ("i1.png", "i2.JPG", "i3.svg", "secret.txt"):
        (folder / "images" / name).write_bytes(name.encode())
    return folder


def train(folder, model):
    settings = {**QUIET, "data_path": str(folder), "learning_rate": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(model, "tiny", settings=settings).checkpoint.resolve()


@pytest.fixture(scope="module")
def checkpoint(folder):
    return train(folder, "SLIFMR")


@pytest.fixture(scope="module")
def address(folder, checkpoint):
    """The address of ``slifmr serve``, which Ctrl+C stops."""
    program = [sys.executable, "-c", "from recbole_slifmr.cli import main; main()", "serve", "--port=0"]
    program += [f"--checkpoint={checkpoint}", "--show=title,year", f"--images={folder / 'images'}"]
    with subprocess.Popen(program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            found = re.fullmatch(r"SLIFMR on tiny: (http://127\.0\.0\.1:\d+) \(Ctrl\+C stops\)\n", said)
            assert found, said + process.stderr.read()
            yield found[1]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (130, 0)  # 0 where the tests were started with Ctrl+C ignored
            assert process.stderr.read().strip() in ("stopped", "")
        finally:
            process.kill()


def ask(address, path, method="GET", data=None, **headers):
    """Return status, headers and text of a response."""
    request = Request(f"{address}{path}", data, headers, method=method)
    try:
        with urlopen(request, timeout=20) as response:
            return response.status, response.headers, response.read().decode()
    except HTTPError as error:
        return error.code, error.headers, error.read().decode()


def answer(address, name, **parameters):
    status, headers, text = ask(address, f"/api/{name}?{urlencode(parameters)}")
    assert status == 200 and headers["content-type"] == "application/json", text
    return json.loads(text)


def slifmr(capsys, *arguments):
    """Run a command; return its exit status, output and errors."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


# -- answers ---------------------------------------------------------------------------------------------------------


def test_recommendations_are_those_of_the_command_with_titles_and_the_same_reasons(address, checkpoint, capsys):
    arguments = ["--checkpoint", checkpoint, "--users=u5", "--k=4", "--explain", "--show=title", "--format=jsonl"]
    _, out, _ = slifmr(capsys, "recommend", *arguments)
    expected = [json.loads(line) for line in out.splitlines()]
    found = answer(address, "recommend", user="u5", k=4, explain=True)
    assert [(row["rank"], row["item"], row["title"], row["score"]) for row in found] == [
        (row["rank"], row["item"], row["title"], row["score"]) for row in expected
    ]
    assert [row["reason"] for row in found] == [sentence(row["explanation"], title_of, 160) for row in expected]
    plain = answer(address, "recommend", user="u5", k=4)
    assert plain == [{**row, "reason": None} for row in found]


def history_of(folder, user):
    rows = pd.read_csv(folder / "tiny" / "tiny.inter", sep="\t", skiprows=1, names=["user", "item"])
    return set(rows.loc[rows["user"] == user, "item"])


def test_the_slider_goes_from_relevance_to_popularity(address, folder):
    n_left = 15 - len(history_of(folder, "u5"))
    ranked = {share: answer(address, "recommend", user="u5", k=100, popularity=share) for share in (0, 0.5, 1)}
    by_item = {row["item"]: row for row in ranked[0]}
    assert [len(rows) for rows in ranked.values()] == [n_left] * 3, "each item that the user has not got, once"
    scores, users = ([row[name] for row in ranked[share]] for name, share in (("score", 0), ("users", 1)))
    assert scores == sorted(scores, reverse=True) and users == sorted(users, reverse=True)
    assert len(set(users)) > 2 and [row["item"] for row in ranked[1]] != [row["item"] for row in ranked[0]]
    for rows in ranked.values():
        assert all(row["score"] == by_item[row["item"]]["score"] for row in rows), "the score stays the model's"
    means = [sum(row["users"] for row in rows[:3]) for rows in ranked.values()]
    assert means[0] <= means[1] <= means[2]


def test_a_history_is_what_the_file_has_in_parts(address, folder):
    first, rest = (answer(address, "user", user=EVIL_USER, limit=3, offset=offset) for offset in (0, 3))
    assert first["user"] == EVIL_USER and first["items"] == len(history_of(folder, EVIL_USER))
    rows = first["history"] + answer(address, "user", user=EVIL_USER, offset=3)["history"]
    assert {row["item"] for row in rows} == history_of(folder, EVIL_USER) and len(rows) == first["items"]
    assert rest["history"] == rows[3:6]
    assert all(row["title"] == title_of(row["item"]) and row["details"].startswith(("199", "200")) for row in rows)


@pytest.mark.parametrize(
    "text, items",
    [("bus", ["i1", "i0", "i2"]), ("LAST bus", ["i0", "i2"]), ("i7", ["i7"]), ("ünd", ["i4"]), ("no such", [])],
)
def test_items_are_found_by_id_and_by_title(address, text, items):
    found = [row["item"] for row in answer(address, "search", q=text)["items"]]
    assert found[:1] == items[:1] and sorted(found) == sorted(items)


def test_users_are_found_by_id_the_whole_id_first(address):
    assert answer(address, "search", q="U1", limit=2)["users"][0]["user"] == "u1"
    assert [row["user"] for row in answer(address, "search", q="<b>")["users"]] == [EVIL_USER]
    start = answer(address, "search", limit=100)
    assert len(start["users"]) == 20 and len(start["items"]) == 15
    counts = [row["users"] for row in start["items"]]
    assert counts == sorted(counts, reverse=True)


def test_similar_items_are_those_of_the_command(address, checkpoint, capsys):
    _, out, _ = slifmr(capsys, "recommend", "--checkpoint", checkpoint, "--similar-items=i5", "--k=5", "--format=jsonl")
    expected = [json.loads(line) for line in out.splitlines()]
    found = answer(address, "similar", item="i5", k=5)
    assert [(row["item"], row["score"]) for row in found] == [(row["similar_item"], row["cosine"]) for row in expected]
    item = answer(address, "item", item="i5")
    assert (item["item"], item["title"], item["details"], item["image"]) == ("i5", "Film i5", "1995", None)


def test_a_model_without_representations_and_reasons_says_so(folder):
    trained = load_trained(train(folder, "EASE"))
    lookup = Lookup(trained, ItemColumns(pd.DataFrame()))
    about = lookup.about()
    assert (about["explains"], about["compares"]) == (False, False)
    assert [row.reason for row in lookup.recommend("u5", 2, explain=True)] == [None, None]
    assert lookup.item("i3").title == "i3", "without a title the id"
    status, _, text = ask_app(make_app(lookup), "/api/similar?item=i3")
    assert status == 404 and json.loads(text) == {"error": "EASE has no representations of items to compare"}


# -- limits ----------------------------------------------------------------------------------------------------------

BAD = {
    "/api/recommend?user=<script>nobody": 404,
    "/api/recommend?user=[PAD]": 404,
    "/api/user?user=<script>": 404,
    "/api/item?item=../../etc/passwd<script>": 404,
    "/api/similar?item=<script>": 404,
    "/image?item=../secret<script>": 404,
    "/image?item=secret": 404,
    "/image?item=i3": 404,
    "/<script>": 404,
    "/docs": 404,
    "/api/recommend": 422,
    "/api/recommend?user=u5&k=0": 422,
    "/api/recommend?user=u5&k=101": 422,
    "/api/recommend?user=u5&k=<script>": 422,
    "/api/recommend?user=u5&popularity=nan": 422,
    "/api/recommend?user=u5&popularity=1.1": 422,
    "/api/user?user=u5&offset=-1": 422,
    f"/api/search?q={'<script>' * 26}": 422,
    f"/api/search?q={'x' * 20_000}": 431,
}


@pytest.mark.parametrize("path", BAD, ids=lambda path: path[:40])
def test_what_cannot_be_answered_is_a_line_that_repeats_nothing(address, path):
    status, headers, text = ask(address, quote(path, safe="/?=&"))
    assert status == BAD[path]
    assert "script" not in text and "\n" not in text.strip() and str(Path.home()) not in text
    assert list(json.loads(text)) == ["error"] and headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_written(address, method):
    assert ask(address, "/api/item?item=i5", method)[0] == 405
    assert ask(address, "/api/item?item=i5", method, b"title=x")[0] == 413
    described = json.loads(ask(address, "/openapi.json")[2])["paths"]
    assert {"/api/recommend", "/api/similar", "/health", "/metrics"} <= set(described)
    assert {name for path in described.values() for name in path} == {"get"}


def test_every_response_tells_the_browser_to_run_nothing_else(address):
    script, style = (re.search(rf"<{tag}>", PAGE.read_text()) for tag in ("script", "style"))
    assert script and style
    for path in ("/", "/api/about", "/nowhere", "/image?item=i1", "/metrics"):
        headers = ask(address, path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
        assert "https:" not in policy and headers["x-content-type-options"] == "nosniff"
    assert "img-src 'self' https:;" in security_headers(PAGE.read_text(), True)["content-security-policy"]


def test_another_name_for_this_machine_is_refused(address):
    port = address.rpartition(":")[2]
    assert ask(address, "/api/about", Host=f"localhost:{port}")[0] == 200
    assert ask(address, "/api/about", Host=f"evil.example:{port}")[0] == 400


def test_images_are_the_files_of_the_folder_and_no_others(address):
    for item, kind, name in (("i1", "image/png", "i1.png"), ("i2", "image/jpeg", "i2.JPG")):
        where = answer(address, "item", item=item)["image"]
        status, headers, text = ask(address, f"/{where}")
        assert (status, headers["content-type"], text) == (200, kind, name)
    assert answer(address, "item", item="i3")["image"] is None, "an SVG may hold a script"


def test_addresses_of_images_begin_with_https(checkpoint):
    config = load_trained(checkpoint).config
    assert read_image_urls(config, "poster") == {f"i{i}": f"https://a.example/{i}.jpg" for i in range(1, 15, 2)}
    with pytest.raises(DataError, match="no value of 'title' is an address"):
        read_image_urls(config, "title")


def test_requests_are_counted_by_known_paths(address):
    def count():
        lines = ask(address, "/metrics")[2].splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = count()
    ask(address, "/api/item?item=i5"), ask(address, "/surely/not/there"), ask(address, "/api/item?item=nobody")
    after = count()
    for path, status in (("/api/item", 200), ("/api/item", 404), ("other", 404)):
        name = f'slifmr_requests_total{{path="{path}",status="{status}"}}'
        assert after[name] == before.get(name, 0) + 1
    assert after['slifmr_request_seconds_total{path="/api/item"}'] > 0 and after["slifmr_resident_bytes"] > 1e7
    assert not any("surely" in name for name in after)
    assert json.loads(ask(address, "/health")[2])["status"] == "ok"


def ask_app(app, path):
    """Ask an application without a server; return status, headers and text."""
    sent, (path, _, query) = [], path.partition("?")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
    with contextlib.suppress(RuntimeError):  # which uvicorn logs
        asyncio.run(app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), body.decode()


class SlowLookup:
    images = {}

    def search(self, text, limit):
        time.sleep(0.3)

    def user(self, token, limit, offset):
        raise RuntimeError("a fault of <script>")


def test_a_question_that_takes_too_long_is_given_up():
    start = time.monotonic()
    app = make_app(SlowLookup(), timeout=0.05)
    status, headers, text = ask_app(app, "/api/search?q=x")
    assert status == 503 and "no answer within 0.05 s" in text and headers[b"retry-after"] == b"5"
    assert time.monotonic() - start < 5


def test_a_fault_says_nothing_of_itself():
    status, headers, text = ask_app(make_app(SlowLookup()), "/api/user?user=u5")
    assert status == 500 and json.loads(text) == {"error": "the server failed; its terminal says why"}
    assert headers[b"x-content-type-options"] == b"nosniff"


# -- the command -----------------------------------------------------------------------------------------------------


def test_what_keeps_it_from_starting_is_one_line_and_status_2(folder, checkpoint, capsys, monkeypatch, tmp_path):
    def refused(*arguments):
        status, out, error = slifmr(capsys, "serve", "--port=0", *arguments)
        assert status == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    (tmp_path / "none.pth").write_text("no checkpoint")
    assert "none.pth" in refused("--checkpoint", tmp_path / "none.pth")
    assert "no files such as ITEM.jpg" in refused("--checkpoint", checkpoint, "--images", tmp_path)
    assert "leave one out" in refused("--checkpoint", checkpoint, "--images", tmp_path, "--image_field=poster")
    assert "no column 'cover'" in refused("--checkpoint", checkpoint, "--image_field=cover")
    assert "cannot be listened on" in refused("--checkpoint", checkpoint, "--host=192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in refused(
            "--checkpoint", checkpoint, f"--port={port}"
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install fastapi uvicorn" in refused("--checkpoint", checkpoint)


def test_no_other_module_imports_the_extra():
    package = Path(sys.modules["recbole_slifmr"].__file__).parent
    at_the_top = re.compile(r"^(?:import|from) (?:fastapi|starlette|uvicorn|recbole_slifmr\.serve\.web)", re.MULTILINE)
    found = [path.name for path in package.rglob("*.py") if at_the_top.search(path.read_text(encoding="utf-8"))]
    assert found == ["web.py"]


# -- in a browser ----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium, spoken to in its own protocol through a pipe: it can type, and be as narrow as a phone."""

    def __init__(self, program, profile):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', program, *options,
             f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        self.rest, self.number, self.session, self.events = b"", 0, {}, []
        pages = [page for page in self.call("Target.getTargets")["targetInfos"] if page["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = {"sessionId": self.session["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = self.process.stdout.read(65536)
                assert part, "the browser has gone"
                self.rest += part
            text, _, self.rest = self.rest.partition(b"\0")
            answered = json.loads(text)
            if answered.get("id") == self.number:
                return answered["result"]
            self.events.append(answered)

    def see(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url, width=1280):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Page.navigate", url="about:blank")  # else another view of the same page would be no new document
        wait_for(lambda: self.see("location.href") == "about:blank")
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.see("document.querySelector('main h1') !== null"))

    def press(self, *keys):
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            pressed = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
            self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def close(self):
        with contextlib.suppress(AssertionError):
            self.call("Browser.close")
        self.process.communicate(timeout=20)


@pytest.fixture
def browser(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None or os.name != "posix":
        pytest.skip("no chromium or google-chrome on PATH to open the page with")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


def test_in_a_browser_titles_are_text_and_the_keyboard_is_enough(address, browser):
    for view in ("user=u5", "item=i5", "search=img", f"user={quote(EVIL_USER)}", "item=i3", "user=nobody"):
        for width in (1280, 390):
            browser.open(f"{address}/#{view}", width)
            assert browser.see("document.documentElement.scrollWidth") <= width, view
            assert browser.see("document.title").endswith("slifmr")
            assert (
                browser.see("document.querySelectorAll('script, main b, main img[onerror], main script').length") == 1
            )
    browser.open(f"{address}/#item=i3")
    assert browser.see("document.querySelector('h1').textContent") == EVIL
    browser.open(f"{address}/#user={quote(EVIL_USER)}")
    assert browser.see("document.querySelector('h1').textContent") == f"User {EVIL_USER}"

    unnamed = """[...document.querySelectorAll('a, button, input')].filter(e => !(e.labels?.length || e.textContent))"""
    assert browser.see(f"{unnamed}.length") == 0
    browser.open(f"{address}/#user=u5")
    browser.see("document.querySelector('#mix').focus()")
    titles = "[...document.querySelectorAll('ol a')].map(link => link.textContent).join()"
    before = browser.see(titles)
    browser.press(*["ArrowRight"] * 10)
    wait_for(lambda: browser.see("location.hash") == "#user=u5&popularity=1")
    wait_for(lambda: browser.see(titles) != before)
    assert browser.see("document.querySelector('output').textContent") == "popularity only"

    browser.see("document.querySelector('#q').focus()")
    browser.press(*"last bus")
    wait_for(lambda: browser.see("document.querySelectorAll('main li').length") == 2)
    assert browser.see("document.activeElement.id") == "q", "typing goes on"
    browser.press("Tab", "Tab", "Enter")
    wait_for(lambda: browser.see("document.activeElement.tagName") == "H1")
    assert browser.see("[location.hash, document.title].join()").startswith("#item=i0,The Last Bus")

    asked = {e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith((f"{address}/", "about:"))} == set()
    assert [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"] == []
    errors = [e["params"]["entry"] for e in browser.events if e["method"] == "Log.entryAdded"]
    assert {e["url"].removeprefix(address) for e in errors} <= {"/favicon.ico", "/api/user?user=nobody&limit=12"}
