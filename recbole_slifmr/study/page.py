"""One HTML page from the folders that benchmarks, studies and searches leave behind; it needs no network.

A folder's files make its section, whatever command wrote them: ``*.md`` is rendered, ``*.png`` embedded, ``*.csv`` and
``*.json`` become tables, ``*.yaml`` is shown as it is. Folders below it that hold ``*.md`` or ``*.png`` follow as
sections of their own. All text counts as untrusted: it is escaped, and the page's policy lets no script run but its own
and nothing be loaded.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markdown_it import MarkdownIt
from PIL import Image

from recbole_slifmr import __version__
from recbole_slifmr.errors import DataError, SettingError, not_written
from recbole_slifmr.files import replace_file

TEMPLATES = Path(__file__).with_name("templates")
MAX_ROWS = 500
MEANING = {
    "best.yaml": "the winner's settings",
    "manifest.json": "how it was made: command, versions, hardware, data, settings",
    "parallel.html": "interactive parallel coordinates",
    "results.csv": "a row per run",
    "results.json": "scores and tests in full",
    "search.json": "what was searched",
    "test.csv": "the winner on test, a row per seed",
    "trials.csv": "a row per trial, best first",
}


class Text(NamedTuple):
    """A rendered Markdown file."""

    title: str
    html: str


class Table(NamedTuple):
    """A table of formatted cells.

    Attributes:
        title: what it shows.
        header: names of the columns; empty for a list of names and values.
        rows: the first ``MAX_ROWS``.
        n_rows: how many there are.
        numeric: for each column, whether it holds numbers only.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_rows: int
    numeric: Sequence[bool]


class Plot(NamedTuple):
    """A picture as a data URI, with its size in pixels."""

    title: str
    uri: str
    width: int
    height: int


class Named(NamedTuple):
    """What was made of a file."""

    name: str
    meaning: str
    content: Any


class Section(NamedTuple):
    """What a folder holds.

    Attributes:
        title: kind, name and data set, or the folder's name.
        folder: where it lies.
        level: of the heading: 2, or 3 for a folder below one that was given.
        caption: from ``results.json``, where no Markdown file has it.
        texts: Markdown files, ``table.md`` first.
        plots: pictures.
        csv: a :class:`Table` per ``*.csv``.
        yaml: the text of each ``*.yaml``.
        json: a list of tables per ``*.json``.
        files: a relative address for each other file.
    """

    title: str
    folder: str
    level: int
    caption: str
    texts: Sequence[Text]
    plots: Sequence[Plot]
    csv: Sequence[Named]
    yaml: Sequence[Named]
    json: Sequence[Named]
    files: Sequence[Named]


def write_page(folders: Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """Write one page that shows what the folders hold.

    Args:
        folders: outputs of benchmarks, studies and searches.
        out: file to write.

    Returns:
        the file.

    Raises:
        DataError: for a folder that does not exist, holds nothing to show, or has a file that cannot be read.
        SettingError: if ``out`` is no HTML file or cannot be written there.
        StorageError: if the disk is full or fails.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise SettingError(f"--out={out}: the page is HTML, give a name that ends in .html")
    given = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    sections = [section for folder in given for section in _read_tree(folder, out)]
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        sections=sections,
        version=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, lambda part: part.write_text(page, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise not_written(f"--out={out}", error) from None
    return out


def _hash(text: str) -> str:
    """Return what the page's policy knows its own style and script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# -- folders ------------------------------------------------------------------------------------------------------


def _read_tree(folder: Path, out: Path) -> list[Section]:
    """Return the sections of a folder and of those below it that hold tables or plots."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    below = {file.parent for kind in ("*.md", "*.png") for file in folder.rglob(kind)} - {folder}
    below = {path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    sections = [
        section for path in (folder, *sorted(below)) if (section := _read_folder(path, out, folder)) is not None
    ]
    if not sections:
        raise DataError(
            f"{folder} holds nothing to report on (no *.md, *.csv, *.png or *.yaml): give the --out folder of a "
            "benchmark, a study or a search that is done"
        )
    return sections


def _read_folder(folder: Path, out: Path, top: Path) -> Section | None:
    """Return what a folder holds, None if that is nothing to show."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")}
    kinds: dict[str, list[Path]] = {kind: [] for kind in ("md", "png", "csv", "yaml", "json", "other")}
    for file in files.values():
        kind = file.suffix.lower()[1:].replace("yml", "yaml")
        if file.resolve() != out.resolve():
            kinds[kind if kind in kinds else "other"].append(file)
    if not any(kinds[kind] for kind in ("md", "png", "csv", "yaml")):
        return None
    contents = {file.name: _read_json(file) for file in kinds["json"]}
    sources = {file: _read_text(file) for file in sorted(kinds["md"], key=lambda file: file.name != "table.md")}
    level = 2 if folder == top else 3
    caption = str(contents.get("results.json", {}).get("caption", ""))
    return Section(
        title=_title(contents, folder, top),
        folder=str(folder),
        level=level,
        caption="" if any(caption in source for source in sources.values()) else caption,
        texts=[
            Text("" if file.name == "table.md" else _words(file.stem), _render(text, level))
            for file, text in sources.items()
        ],
        plots=[_read_plot(file) for file in kinds["png"]],
        csv=[_named(file, _read_csv(file)) for file in kinds["csv"]],
        yaml=[_named(file, _read_text(file)) for file in kinds["yaml"]],
        json=[_named(file, tables_of(contents[file.name])) for file in kinds["json"]],
        files=[_named(file, _address(file, out)) for file in kinds["other"]],
    )


def _title(contents: Mapping[str, Any], folder: Path, top: Path) -> str:
    """Return what was done on which data; the folder's name where nothing says so."""
    manifest, search = contents.get("manifest.json", {}), contents.get("search.json", {})
    if manifest:
        done = _words(str(manifest.get("study") or "benchmark"))
    elif search:
        done = f"Search for {search.get('model')}"
    else:
        return _words(folder.resolve().name if folder == top else folder.relative_to(top).as_posix())
    dataset = (manifest or search).get("dataset")
    return f"{done} on {_cell(dataset)}" if dataset else done


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _named(file: Path, content: Any) -> Named:
    return Named(file.name, MEANING.get(file.name, ""), content)


def _address(file: Path, out: Path) -> str:
    relative = os.path.relpath(file.resolve(), out.resolve().parent)
    return "./" + quote(os.fsencode(Path(relative).as_posix()))


# -- files --------------------------------------------------------------------------------------------------------


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text ({error})") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:  # a ValueError too: a number of more digits than Python reads
        raise DataError(f"{file} is not JSON ({error}): run the command that wrote it again") from None
    return content if isinstance(content, dict) else {"": content}


def _read_csv(file: Path) -> Table:
    text = _read_text(file)
    if not text:
        raise DataError(f"{file} is empty: run the command that wrote it again")
    shown: list[list[str]] = []
    n_rows = 0
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        for line in lines:
            if len(line) != len(header):
                raise DataError(
                    f"{file}, line {lines.line_num}: {len(line)} columns, but the header has {len(header)}: "
                    "run the command that wrote it again"
                )
            n_rows += 1
            if n_rows <= MAX_ROWS:
                shown.append([_number(cell) for cell in line])
    except csv.Error as error:
        raise DataError(f"{file}, line {lines.line_num}: {error}: run the command that wrote it again") from None
    if n_rows <= 8 and len(header) > 16:  # too wide to read: a row per column
        header, *shown = [list(column) for column in zip(header, *shown, strict=True)]
        n_rows = len(shown)
    return _table("", header, shown, n_rows)


def _read_plot(file: Path) -> Plot:
    """Embed a picture; its title is the ``Description`` in the file, or else the file's name."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            width, height = picture.size
            title = picture.info.get("Description") or _words(file.stem)
            picture.verify()
        data = base64.b64encode(file.read_bytes()).decode()
    except (OSError, SyntaxError) as error:
        raise DataError(f"{file} is not a PNG picture ({error}): run the command that wrote it again") from None
    return Plot(str(title), f"data:image/png;base64,{data}", width, height)


def _markdown() -> MarkdownIt:
    """Return a reader of Markdown with tables and without links, pictures and HTML."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["link", "image", "autolink", "reference", "html_inline", "html_block"])
    reader.add_render_rule(
        "table_open", lambda *_: '<div class="scroll" role="group" aria-label="Table" tabindex="0"><table>'
    )
    reader.add_render_rule("table_close", lambda *_: "</table></div>")
    return reader


def _render(text: str, level: int) -> str:
    """Return Markdown as HTML, headings below ``level``; of HTML, only ``<u>`` around plain text stays."""
    reader = _markdown()
    tokens = reader.parse(text)
    highest = min((int(token.tag[1]) for token in tokens if token.type == "heading_open"), default=1)
    for token in tokens:
        if token.type.startswith("heading_"):
            token.tag = f"h{min(6, int(token.tag[1]) - highest + 1 + level)}"
        if str(token.attrs.pop("style", "")).endswith("right"):
            token.attrs["class"] = "number"
    html = reader.renderer.render(tokens, reader.options, {})
    return re.sub(r"&lt;u&gt;([^<&]*)&lt;/u&gt;", r"<u>\1</u>", html)


# -- tables -------------------------------------------------------------------------------------------------------


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """Return the content of a JSON file as tables: one for its plain values, one for each nested value."""
    nested = {name: value for name, value in content.items() if value and _is_nested(value)}
    plain = [(name, _cell(value)) for name, value in content.items() if name not in nested]
    tables = [_table("", (), plain)] if plain else []
    return tables + [_nested_table(name, value) for name, value in nested.items()]


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(entry, dict) for entry in value))


def _nested_table(name: str, value: Any) -> Table:
    if isinstance(value, list):
        return _records(name, value)
    if all(isinstance(entry, list) and _is_nested(entry) for entry in value.values()):
        return _records(name, [{"name": key, **record} for key, records in value.items() for record in records])
    if not all(isinstance(entry, dict) for entry in value.values()):
        return _table(name, (), [(key, _cell(entry)) for key, entry in value.items()])
    inner = list(dict.fromkeys(key for entry in value.values() for key in entry))
    if len(inner) <= len(value):
        return _records(name, [{"name": key, **entry} for key, entry in value.items()])
    return _records(name, [{"name": key, **{outer: value[outer].get(key) for outer in value}} for key in inner])


def _records(name: str, records: Sequence[Mapping[str, Any]]) -> Table:
    header = list(dict.fromkeys(key for record in records for key in record))
    return _table(name, header, [[_cell(record.get(key)) for key in header] for record in records])


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], n_rows: int | None = None) -> Table:
    columns = itertools.zip_longest(*rows) if rows else [()] * len(header)
    numeric = [any(column) and all(_is_number(cell) for cell in column if cell) for column in columns]
    return Table(title, header, rows[:MAX_ROWS], len(rows) if n_rows is None else n_rows, numeric)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?( ± .*)?", cell) is not None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict) and value.keys() == {"mean", "std"}:
        spread = _cell(value["std"])
        return _cell(value["mean"]) + (f" ± {spread}" if spread not in ("", "nan") else "")
    if isinstance(value, list) and not _is_nested(value):
        return ", ".join(_cell(entry) for entry in value)
    if isinstance(value, float):
        return _number(repr(value))
    return value if isinstance(value, str) else json.dumps(value)


def _number(cell: str) -> str:
    """Shorten a number with digits behind the point to four significant ones; leave all else."""
    if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?|-?\d+e-\d+", cell) is None:
        return cell
    number = float(cell)
    return f"{number:.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"
