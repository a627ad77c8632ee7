"""Broken files: whatever they hold, they load as they say or one line says what is wrong, and none is changed."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data import create_dataset

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config

HEADER = 128  # bytes of a .npy file before its numbers
TABLES = ("tiny.inter", "tiny.kg", "tiny.link")
BOUNDED = settings(max_examples=300, deadline=None, derandomize=True, database=None)
PIECES = [b"", b"\t", b"\t\t", b" ", b"\n", b"\r", b"\r\n", b'"', b'""', b"'", b",", b":", b"#", b"\\", b"\0",
          b"\xff", b"\xc3", b"\xef\xbb\xbf", "ü\u2028".encode(), b"nan", b"i3", b"u1\ti1", b"e1", b"token"]  # fmt: skip


def cut(content, start, length, piece):
    """Replace a part, given as shares of the whole, by a piece."""
    at = round(start * len(content))
    return content[:at] + piece + content[at + length :]


def on_line(content, share, change):
    lines = content.split(b"\n")
    at = round(share * (len(lines) - 2))
    lines[at : at + 1] = change(lines[at])
    return b"\n".join(lines)


share = st.floats(0, 1)
CHANGES = st.one_of(
    st.builds(lambda s, n, p: lambda c: cut(c, s, n, p), share, st.integers(0, 3), st.sampled_from(PIECES)),
    st.builds(lambda s: lambda c: on_line(c, s, lambda line: []), share),
    st.builds(lambda s: lambda c: on_line(c, s, lambda line: [line, line]), share),
    st.builds(lambda s, p: lambda c: on_line(c, s, lambda line: [line + p]), share, st.sampled_from(PIECES)),
    st.builds(lambda s: lambda c: on_line(c, s, lambda line: line.split(b"\t")[:1]), share),
    st.builds(lambda s: lambda c: c[: round(s * len(c))], share),
    st.sampled_from([lambda c: c.replace(b"\n", b"\r\n"), lambda c: b"\xef\xbb\xbf" + c, lambda c: b"",
                     lambda c: c.replace(b"\t", b","), lambda c: c.split(b"\n")[0], lambda c: c.strip()]),
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The files of a good data set, by name."""
    root = write_tiny(tmp_path_factory.mktemp("fuzz"))
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "tiny").mkdir()
    return make_config("SLIFMR", "tiny", settings={**QUIET, "data_path": str(folder)})


def load(config, files):
    """Return the data set made of these files, or None if one line says what is wrong; no file changes."""
    root = Path(config["data_path"])
    for name, content in files.items():
        (root / name).write_bytes(content)
    try:
        dataset = create_dataset(config)
        dataset.build()
    except (DataError, SettingError) as error:
        assert str(error) and "\n" not in str(error)
        dataset = None
    assert {path.name: path.read_bytes() for path in root.iterdir()} == files
    return dataset


def rows_of(content):
    """Read a table with Python's own parser."""
    text = io.StringIO(content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    header, *rows = (row for row in csv.reader(text, delimiter="\t") if row and "".join(row).strip(" "))
    names = [column.split(":")[0] for column in header]
    return [dict(zip(names, row, strict=True)) for row in rows]


@BOUNDED
@given(st.sampled_from(TABLES), st.lists(CHANGES, min_size=1, max_size=2))
def test_broken_tables(original, config, table, changes):
    files = dict(original)
    for change in changes:
        files[table] = change(files[table])
    dataset = load(config, files)
    if dataset is None:
        return
    users, items = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    pairs = zip(users[dataset.inter_feat["user_id"]], items[dataset.inter_feat["item_id"]], strict=True)
    assert sorted(pairs) == sorted((row["user_id"], row["item_id"]) for row in rows_of(files["tiny.inter"]))
    entities, relations = dataset.field2id_token["entity_id"], dataset.field2id_token["relation_id"]
    triples = {(entities[h], relations[r], entities[t]) for h, r, t in dataset.triples.tolist()}
    assert triples == {(row["head_id"], row["relation_id"], row["tail_id"]) for row in rows_of(files["tiny.kg"])}
    links = {(row["item_id"], row["entity_id"]) for row in rows_of(files["tiny.link"])}
    assert set(dataset.item2entity.items()) <= links


ARRAYS = st.builds(
    lambda shape, kind, value, at: fill(shape, kind, value, at),
    st.sampled_from([(15, 3), (15, 1), (14, 3), (16, 3), (0, 3), (15, 0), (15,), (15, 3, 2), ()]),
    st.sampled_from(["f4", "f8", "f2", "i8", "u1", "?", "c8", "U3", "O", "M8[s]", "f4,i4", ">f4"]),
    st.sampled_from([0.0, 1.0, np.nan, np.inf, -np.inf, 1e300, 1e-300]),
    st.integers(0, 60),
)


def fill(shape, kind, value, at):
    array = np.zeros(shape, dtype=kind)
    if array.dtype.kind == "f" and array.size:
        array.flat[:] = np.arange(array.size) + 1
        with np.errstate(over="ignore"):
            array.flat[at % array.size] = value
    elif array.dtype.kind in "iu":
        array += 1
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=True)
        return file.getvalue()


@BOUNDED
@given(ARRAYS, st.lists(CHANGES, max_size=1), st.lists(CHANGES, max_size=1))
def test_broken_features(original, config, array, array_changes, ids_changes):
    files = {**original, "text.npy": array}
    for change in array_changes:
        files["text.npy"] = array[:HEADER] + change(array[HEADER:])
    for change in ids_changes:
        files["items.txt"] = change(files["items.txt"])
    dataset = load(config, files)
    if dataset is None:
        return
    values, mask = dataset.item_features["text"]
    assert values.isfinite().all() and not values[~mask].any()
    rows = np.load(io.BytesIO(files["text.npy"]))
    tokens = files["items.txt"].decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    known = dataset.field2token_id["item_id"]
    for token, row in zip(tokens, rows, strict=True):
        if known.get(token, 0):
            np.testing.assert_array_equal(values[known[token]].numpy(), row.astype(np.float32))
