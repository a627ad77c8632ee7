"""One page from output folders: everything in it, nothing fetched, nothing run but its own script."""

import csv
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from recbole_slifmr.cli import main
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.study import plots, statistics, tables
from recbole_slifmr.study.page import MAX_ROWS, write_page

EVIL = """<script>document.title = "owned"</script><img src=x onerror='document.title = "owned"'>"""


class Page(HTMLParser):
    """What a page holds: elements with their attributes, and the rows of each table."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.tables = [], []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.tables and self.tables[-1] and self.tables[-1][-1] and self.lasttag in ("td", "th", "u", "strong"):
            self.tables[-1][-1][-1] += data.strip("\n")

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def titles(self):
        return re.findall(r'class="title"[^>]*>([^<]*)<', self.text)


def write_rows(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def write_study(folder, name="noise_ratio", model="SLIFMR"):
    """Write a folder as studies and benchmarks do."""
    folder.mkdir(parents=True)
    runs = pd.DataFrame(
        [
            {"model": m, "seed": seed, "test_recall@20": score + seed / 1e6}
            for m, score in ((model, 0.21), ("LightGCN", 0.9), ("KGAT", 0.0123456))
            for seed in (2020, 2021)
        ]
    )
    summary = statistics.summarise(runs)
    cells = tables.cells(summary, ["recall@20"], {})
    text = tables.markdown(list(summary.index), ["recall@20"], cells, "The caption.")
    (folder / "table.md").write_text(text, encoding="utf-8")
    runs.to_csv(folder / "results.csv", index=False)
    plots.plot_bars(folder / "bars.png", summary.set_axis(["a", "b", "c"]), ["recall@20"])
    scores = {"mean": 0.25, "std": float("nan")}
    results = {"caption": "The caption.", "models": {model: {"a": scores, "b": {"mean": 0.123456, "std": 0.01}}}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    manifest = {
        "command": "slifmr study",
        "dataset": "toy",
        "fingerprints": {"train": "b06a"},
        "settings": {"SLIFMR": {"knn_k": "10", "only": "x"}, "LightGCN": {"knn_k": "5"}},
    }
    manifest |= {"study": name} if name else {}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_search(folder):
    """Write a folder as searches do."""
    folder.mkdir()
    (folder / "search.json").write_text(
        json.dumps({"model": "KGAT", "dataset": "toy", "space": {"lr": {"kind": "choice", "values": [1e-3, 0.5]}}})
    )
    write_rows(folder / "trials.csv", [["trial", "score", "error"], ["a_0", "0.60421234", ""], ["a_1", "", EVIL]])
    (folder / "best.yaml").write_text("# trials: 2\nlr: 0.5\n")
    (folder / "parallel.html").write_text(f"<html>{EVIL}</html>")
    return folder


def test_a_study_s_section_has_its_table_caption_plots_runs_and_manifest(tmp_path):
    page = Page(write_page([write_study(tmp_path / "out")], tmp_path / "report.html"))
    assert page.titles() == ["Noise ratio on toy"]
    assert page.tables[0] == [
        ["model", "Recall@20"],
        ["SLIFMR", "0.2120 ± 0.0000"],
        ["LightGCN", "0.9020 ± 0.0000"],
        ["KGAT", "0.0144 ± 0.0000"],
    ]
    assert page.text.count("The caption.") == 2, "below the table and in results.json"
    assert "<u>0.2120</u>" in page.text and "<strong>0.9020</strong>" in page.text
    assert ["KGAT", "2021", "0.01437"] in page.tables[1]
    assert ["command", "slifmr study"] in page.tables[2]
    assert ["train", "b06a"] in page.tables[3]
    assert page.tables[4] == [["name", "knn_k", "only"], ["SLIFMR", "10", "x"], ["LightGCN", "5", ""]]
    assert page.tables[6] == [["name", "SLIFMR"], ["a", "0.25"], ["b", "0.1235 ± 0.01"]]
    (picture,) = page.all("img")
    assert picture["src"].startswith("data:image/png;base64,")
    assert picture["alt"] == ("Plot: Test scores; error bars: standard deviation over seeds (Noise ratio on toy)")
    assert not page.all("nav")


def test_several_folders_and_those_below_them_are_sections_with_contents(tmp_path):
    study = write_study(tmp_path / "study")
    write_study(study / "by_group" / "tail_items", name=None)
    (study / "runs" / "SLIFMR-2020").mkdir(parents=True)
    (study / "runs" / "SLIFMR-2020" / "result.json").write_text("not even read")
    (study / ".hidden").mkdir()
    (study / ".hidden" / "table.md").write_text("")
    plain = tmp_path / "two_plots"
    plain.mkdir()
    shutil.copy(study / "bars.png", plain / "by_noise.png")
    search = write_search(tmp_path / "tune")
    page = Page(write_page([study, search, plain, search], tmp_path / "report.html"))
    assert page.titles() == ["Noise ratio on toy", "Benchmark on toy", "Search for KGAT on toy", "Two plots"]
    links = [attrs["href"] for attrs in page.all("a") if attrs["href"].startswith("#")]
    assert links == [f"#section-{i}" for i in (1, 2, 3, 4)]
    assert [attrs["id"] for attrs in page.all("section")] == [link[1:] for link in links]
    assert [tag for tag, _ in page.elements if re.fullmatch("h[123]", tag)][:2] == ["h1", "h2"]
    assert len(page.all("h1")) == 1
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_search_s_section_has_trials_and_settings_and_names_the_large_plot(tmp_path):
    search = write_search(tmp_path / "a search")
    page = Page(write_page([search], tmp_path / "pages" / "report.html"))
    assert page.tables[0] == [["trial", "score", "error"], ["a_0", "0.6042", ""], ["a_1", "", EVIL]]
    assert "# trials: 2\nlr: 0.5" in page.text
    assert [attrs["href"] for attrs in page.all("a")] == ["./../a%20search/parallel.html"]


def test_short_wide_tables_are_turned_and_long_ones_are_cut(tmp_path):
    write_rows(tmp_path / "test.csv", [["model", *(f"m{i}" for i in range(20))], ["KGAT", *range(20)]])
    write_rows(tmp_path / "trials.csv", [["x"], *([i] for i in range(MAX_ROWS + 7))])
    page = Page(write_page([tmp_path], tmp_path / "report.html"))
    assert page.tables[0][:3] == [["model", "KGAT"], ["m0", "0"], ["m1", "1"]]
    assert len(page.tables[1]) == 1 + MAX_ROWS
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 7} rows." in page.text
    again = Page(write_page([tmp_path], tmp_path / "report.html"))
    assert not again.all("a"), "the page is no part of itself"


def test_numbers_are_shortened_and_all_else_is_left(tmp_path):
    cells = ["0.12345678", "1e-05", "3.4916177566643446e-05", "961457", "12345.678", "60350e12", "1.2.3", "0.1", "nan"]
    write_rows(tmp_path / "x.csv", [["x"], *([cell] for cell in cells)])
    page = Page(write_page([tmp_path], tmp_path / "report.html"))
    shown = [row[0] for row in page.tables[0][1:]]
    assert shown == ["0.1235", "1e-05", "3.492e-05", "961457", "12346", "60350e12", "1.2.3", "0.1", "nan"]


@pytest.fixture
def hostile(tmp_path):
    """A folder where every text is an attack."""
    folder = write_study(tmp_path / "<b>", name=EVIL, model=EVIL)
    (folder / "more.md").write_text(
        f"# {EVIL}\n\n{EVIL}\n\n[x](javascript:alert) ![x](http://a.invalid/x.png) <http://a.invalid> <u>{EVIL}</u>\n\n"
        "[y]: http://a.invalid\n\n[y] <u onclick=alert()>z</u>\n"
    )
    write_rows(folder / "errors.csv", [[EVIL, "x"], ["y", EVIL]])
    (folder / "best.yaml").write_text(f"</code></pre>{EVIL}")
    (folder / "search.json").write_text(json.dumps({EVIL: {EVIL: EVIL}, "a": [EVIL, [{"b": EVIL}], "\ud800"]}))
    (folder / 'javascript:alert()"><b>.html').write_text("")
    return folder


def test_headings_of_a_file_go_below_the_folder_s(tmp_path):
    (tmp_path / "table.md").write_text("### One\n\n#### Below\n\n### Two\n")
    page = Page(write_page([tmp_path], tmp_path / "report.html"))
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)] == ["h1", "h2", "h3", "h4", "h3"]


def test_text_from_the_folders_is_escaped_and_the_page_asks_for_nothing(hostile, tmp_path):
    page = Page(write_page([hostile], tmp_path / "report.html"))
    assert len(page.all("script")) == 1 and len(page.all("img")) == 1
    assert not page.all("b") and not page.all("link")
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        assert attrs.get("src", "data:").startswith("data:")
        assert re.match(r"#|\./", attrs.get("href", "#"))
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not re.search(r"@import|url\(", page.text)


# -- in a browser ----------------------------------------------------------------------------------------------------

WATCH = """<!DOCTYPE html><iframe src="report.html" width="800" height="600"></iframe><pre></pre><script>
onload = () => setTimeout(() => {
  const page = frames[0].document;
  const column = () => Array.from(page.querySelector("tbody").rows, (row) => row.cells[0].textContent);
  const press = (i) => { page.querySelectorAll("thead button")[i].click(); return column(); };
  const seen = {
    title: page.title,
    pictures: Array.from(page.images, (picture) => picture.naturalWidth),
    tables: Array.from(page.querySelectorAll("table"), (table) => table.offsetWidth),
    ground: frames[0].getComputedStyle(page.querySelector("thead th")).position,
    requests: frames[0].performance.getEntriesByType("resource").map((entry) => entry.name),
    orders: [column(), press(1), press(1), press(2), press(0), press(0)],
    sorted: Array.from(page.querySelectorAll("[aria-sort]"), (header) => header.textContent + header.ariaSort),
    too_wide: page.documentElement.scrollWidth > page.documentElement.clientWidth,
  };
  page.querySelector("figure button").click();
  seen.enlarged = page.querySelector("dialog[open] img").naturalWidth;
  page.querySelector("dialog button").click();
  seen.closed = !page.querySelector("dialog[open]");
  document.querySelector("pre").textContent = JSON.stringify(seen);
}, 0);
</script>"""


def look_at(folder, width=800):
    """Open ``report.html`` of a folder in a browser; return what a page around it sees."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH to open the page with")
    (folder / "watch.html").write_text(WATCH.replace('"800"', f'"{width}"'))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security", "--virtual-time-budget=5000",
         f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "watch.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_in_a_browser_it_shows_sorts_and_enlarges_without_a_request(tmp_path):
    study = write_study(tmp_path / "study")
    (study / "table.md").write_text(
        "| model | score | loss |\n|---|---:|---:|\n| SLIFMR | <u>0.2120</u> ± 0.1 | +9.5 [1.0, 2.0] |\n"
        "| LightGCN | **0.9020** ± 0.1 | -10.1 [1.0, 2.0] |\n| KGAT | 0.0144\\*\\* | 10.1% |\n| none | | |\n"
    )
    page = Page(write_page([study, write_search(tmp_path / "tune")], tmp_path / "report.html"))
    seen = look_at(tmp_path)
    width = int(page.all("img")[0]["width"])
    assert seen["pictures"] == [width] and seen["tables"][0] > 100
    assert seen["ground"] == "sticky", "the style is not let in"
    assert [name for name in seen["requests"] if not name.startswith("data:")] == []
    as_written, falling, rising, losses, from_a, from_z = seen["orders"]
    assert as_written == ["SLIFMR", "LightGCN", "KGAT", "none"]
    assert falling == ["LightGCN", "SLIFMR", "KGAT", "none"] and rising == ["KGAT", "SLIFMR", "LightGCN", "none"]
    assert losses == ["KGAT", "SLIFMR", "LightGCN", "none"]
    assert from_a == ["KGAT", "LightGCN", "none", "SLIFMR"] and from_z == from_a[::-1]
    assert seen["sorted"] == ["modeldescending"]
    assert seen["enlarged"] == width and seen["closed"]
    assert not seen["too_wide"]


def test_in_a_browser_no_text_from_the_folders_runs_and_it_fits_a_phone(hostile, tmp_path):
    write_page([hostile], tmp_path / "report.html")
    seen = look_at(tmp_path, width=360)
    assert seen["title"].endswith("on toy")
    assert len(seen["pictures"]) == 1 and seen["requests"] == []
    assert not seen["too_wide"]


# -- the command -----------------------------------------------------------------------------------------------------


def refused(folder, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, [folder, *arguments])])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys):
    write_study(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "report: report.html\n"
    assert Page(Path("report.html")).titles() == ["Noise ratio on toy"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("manifest.json", '{"a": ', "is not JSON"),
        ("manifest.json", '{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("results.csv", "", "is empty"),
        ("results.csv", "a,b\n1,2\n3", "line 3: 1 columns, but the header has 2"),
        ("results.csv", 'a,b\n1,"2', "line 2: unexpected end of data"),
        ("table.md", b"\xff\xfe", "cannot be read as text"),
        ("curves.png", "<svg>", "is not a PNG picture"),
    ],
)
def test_a_broken_file_is_named_and_the_page_of_before_stays(tmp_path, capsys, name, content, says):
    folder = write_study(tmp_path / "out")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "report.html"
    out.write_text("before")
    error = refused(folder, capsys, "--out", out)
    assert f"{name}" in error and says in error
    assert out.read_text() == "before" and sorted(tmp_path.iterdir()) == [folder, out]


def test_a_table_may_have_no_rows(tmp_path):
    (tmp_path / "trials.csv").write_text("trial,score\n")
    assert "score" in write_page([tmp_path], tmp_path / "report.html").read_text()


def test_a_cut_off_picture_is_broken(tmp_path):
    folder = write_study(tmp_path / "out")
    picture = folder / "bars.png"
    picture.write_bytes(picture.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"bars\.png is not a PNG picture"):
        write_page([folder], tmp_path / "report.html")


def test_what_no_page_can_be_made_of_is_one_line(tmp_path, capsys):
    assert "there is no such folder" in refused(tmp_path / "missing", capsys)
    (tmp_path / "search.json").write_text("{}")
    assert "holds nothing to report on" in refused(tmp_path, capsys)
    study = write_study(tmp_path / "out")
    assert "ends in .html" in refused(study, capsys, "--out", study / "results.csv")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(SettingError, match="cannot be written"):
        write_page([study], tmp_path / "taken.html")
