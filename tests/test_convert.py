"""Other layouts, converted: the same tokens, splits, triples and features as an atomic folder laid out by hand."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import QUIET, REAL_DATA, write_table, write_tiny
from recbole.data import create_dataset

from recbole_slifmr.cli import main
from recbole_slifmr.data.convert import Columns, convert_kgat, convert_mmrec, convert_tables, source
from recbole_slifmr.data.features import find_modalities, load_features
from recbole_slifmr.data.vectors import ItemFile
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config

SPLITS = ("train", "valid", "test")


def read(path):
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def rows(path):
    """The rows of an atomic file, sorted."""
    return sorted(map(tuple, read(path).to_numpy()))


def pairs(*paths):
    return sorted(pair for path in paths for pair in map(tuple, read(path).iloc[:, :2].to_numpy()))


def features_by_token(folder):
    tokens = (folder / "items.txt").read_text().split()
    return {path.stem: dict(zip(tokens, np.load(path).tolist(), strict=True)) for path in folder.glob("*.npy")}


def number(tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def spoil(path, content):
    """Write a file anew, as text, bytes or a matrix, or remove it."""
    if content is None:
        path.unlink()
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def expect_error(message, out, convert):
    """Convert into a folder; the error is one line, and nothing is left."""
    with pytest.raises(DataError, match=message) as error:
        convert(out)
    assert "\n" not in str(error.value)
    assert not out.exists() or not list(out.iterdir())


def fixed_split(folder):
    """Give a set with one ``.inter`` a fixed split and links that all lead somewhere; return its folder."""
    name = folder.name
    inter = read(folder / f"{name}.inter")
    for i, split in enumerate(SPLITS):
        part = inter[np.arange(len(inter)) % 10 == i + 7] if i else inter[np.arange(len(inter)) % 10 < 8]
        part.to_csv(folder / f"{name}.{split}.inter", sep="\t", index=False)
    (folder / f"{name}.inter").unlink()
    link = read(folder / f"{name}.link")
    link[(link.iloc[:, 0] != "stray") & (link.iloc[:, 1] != "nowhere")].to_csv(
        folder / f"{name}.link", sep="\t", index=False
    )
    return folder


@pytest.fixture(params=["tiny", "lastfm-mm", "ml-100k-mm"])
def by_hand(request, tmp_path):
    """An atomic folder with a fixed split: a small random one and the real ones."""
    if request.param == "tiny":
        return fixed_split(write_tiny(tmp_path / "by hand"))
    if not REAL_DATA.is_dir():
        pytest.skip("the real data sets are not in shared/data beside the checkout")
    return REAL_DATA / request.param


def lay_out_mmrec(folder, target):
    """Write an atomic folder with a fixed split as MMRec has it: item k has row k, names in mapping files."""
    name = folder.name
    target.mkdir()
    inter = pd.concat([read(folder / f"{name}.{s}.inter").assign(x_label=i) for i, s in enumerate(SPLITS)])
    inter.columns = [column.split(":")[0] for column in inter.columns]
    items = number((folder / "items.txt").read_text().split() + inter["item_id"].tolist())
    users = number(inter["user_id"])
    inter.insert(0, "userID", inter.pop("user_id").map(users))
    inter.insert(1, "itemID", inter.pop("item_id").map(items))
    inter.to_csv(target / f"{name}.inter", sep="\t", index=False)
    for side, names, header in (("u", users, "user_id\tuserID"), ("i", items, "asin\titemID")):
        write_table(target / f"{side}_id_mapping.csv", header, names.items())
    for path in folder.glob("*.npy"):
        values = np.load(path)
        full = np.zeros((len(items), values.shape[1]), values.dtype)
        full[: len(values)] = values
        np.save(target / f"{path.stem}_feat.npy", full)


def lay_out_kgat(folder, target, lists=True):
    """Write an atomic folder with a fixed split as KGAT has it; validation interactions go to training."""
    name = folder.name
    target.mkdir()
    parts = {split: pairs(folder / f"{name}.{split}.inter") for split in SPLITS}
    users = number(user for part in parts.values() for user, _ in part)
    items = number(item for part in parts.values() for _, item in part)
    links = dict(rows(folder / f"{name}.link"))
    triples = read(folder / f"{name}.kg").to_numpy()
    named = {item: links.get(item, f"none {item}") for item in items}  # a name may hold spaces
    entities = number([*named.values(), *triples[:, 0], *triples[:, 2]])
    relations = number(triples[:, 1])
    for file, part in (("train", parts["train"] + parts["valid"]), ("test", parts["test"])):
        lines = pd.DataFrame(part).groupby(0)[1].agg(lambda own: " ".join(str(items[item]) for item in own))
        (target / f"{file}.txt").write_text("".join(f"{users[user]} {own}\n" for user, own in lines.items()))
    graph = "".join(f"{entities[h]} {relations[r]} {entities[t]}\n" for h, r, t in triples)
    with zipfile.ZipFile(target / "kg_final.zip", "w") as archive:
        archive.writestr("kg_final.txt", graph)
    if lists:
        write_list = {"user": users, "entity": entities, "relation": relations}
        for kind, names in write_list.items():
            lines = "".join(f"{token} {i}\n" for token, i in names.items())
            (target / f"{kind}_list.txt").write_text(f"org_id remap_id\n{lines}")
        lines = "".join(f"{item} {i} m.{i}\n" for item, i in items.items())
        (target / "item_list.txt").write_text(f"org_id remap_id freebase_id\n{lines}")


# -- the same content --------------------------------------------------------------------------------------------------


def test_mmrec_gives_back_what_was_laid_out_by_hand(by_hand, tmp_path):
    name = by_hand.name
    lay_out_mmrec(by_hand, tmp_path / "raw")
    summary = convert_mmrec(tmp_path / "raw", tmp_path / "out")
    for split in SPLITS:
        file = f"{name}.{split}.inter"
        assert read(summary.folder / file).columns.tolist() == read(by_hand / file).columns.tolist()
        assert rows(summary.folder / file) == rows(by_hand / file)
    expected = features_by_token(by_hand)
    for modality, values in features_by_token(summary.folder).items():
        assert {token: row for token, row in values.items() if any(row)} == expected[modality]
    inter = pairs(*(by_hand / f"{name}.{split}.inter" for split in SPLITS))
    assert (summary.n_users, summary.n_items) == tuple(len(set(side)) for side in zip(*inter, strict=True))
    assert sum(summary.n_interactions.values()) == len(inter)
    assert summary.density == pytest.approx(len(inter) / summary.n_users / summary.n_items)


def test_kgat_gives_back_what_was_laid_out_by_hand(by_hand, tmp_path):
    name = by_hand.name
    lay_out_kgat(by_hand, tmp_path / "raw")
    summary = convert_kgat(tmp_path / "raw", tmp_path / "out", name)
    new = {split: summary.folder / f"{name}.{split}.inter" for split in SPLITS}
    assert pairs(new["test"]) == pairs(by_hand / f"{name}.test.inter")
    assert pairs(new["train"], new["valid"]) == pairs(*(by_hand / f"{name}.{s}.inter" for s in ("train", "valid")))
    assert rows(summary.folder / f"{name}.kg") == rows(by_hand / f"{name}.kg")
    assert rows(summary.folder / f"{name}.link") == rows(by_hand / f"{name}.link")
    assert summary.n_linked == len(rows(by_hand / f"{name}.link"))
    assert summary.n_triples == len(rows(by_hand / f"{name}.kg"))


@pytest.mark.parametrize("separator", [",", "\t", "|"])
def test_tables_give_back_what_was_laid_out_by_hand(tmp_path, separator):
    folder = write_tiny(tmp_path / "by hand")
    files = {"interactions": "inter", "triples": "kg", "links": "link"}
    for file, suffix in files.items():
        frame = read(folder / f"tiny.{suffix}")
        frame.columns = [column.split(":")[0] for column in frame.columns]
        frame.to_csv(tmp_path / file, sep=separator, index=False)
        files[file] = tmp_path / file
    summary = convert_tables(
        out=tmp_path / "out",
        name="tiny",
        features={"text": folder / "text.npy", "image": folder / "image.npy"},
        **files,
    )
    for suffix in ("inter", "kg"):
        assert (summary.folder / f"tiny.{suffix}").read_text() == (folder / f"tiny.{suffix}").read_text()
    kept = [row for row in rows(folder / "tiny.link") if row not in [("stray", "e1"), ("i0", "nowhere")]]
    assert rows(summary.folder / "tiny.link") == kept
    assert summary.notes == ["2 links to an unknown item or entity left out"]
    assert features_by_token(summary.folder) == features_by_token(folder)
    assert summary.covered == {"text": (6, 14), "image": (4, 14)}, "one row is of an item nobody met, one item has none"


# -- MMRec -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mmrec(tmp_path):
    """A small set in MMRec's layout, without mappings."""
    folder = tmp_path / "baby"
    folder.mkdir()
    interactions = [(u, i, (u + i) % 3) for u in range(4) for i in range(5)]
    write_table(folder / "baby.inter", "userID\titemID\tx_label", interactions)
    np.save(folder / "text_feat.npy", np.arange(18, dtype=np.float32).reshape(6, 3))
    return folder


def test_without_mappings_the_numbers_are_the_tokens(mmrec, tmp_path):
    folder = convert_mmrec(mmrec, tmp_path / "out").folder
    assert (folder / "items.txt").read_text() == "0\n1\n2\n3\n4\n5\n"
    assert ("3", "0") in pairs(folder / "baby.train.inter")


def test_names_with_commas_and_quotes_are_kept(mmrec, tmp_path):
    names = ['"Weird, Al"', "Net, The", "a b", "c,1", "d", "e"]
    write_table(mmrec / "i_id_mapping.csv", "asin    itemID", zip(names, range(6), strict=True))
    folder = convert_mmrec(mmrec, tmp_path / "out").folder
    tokens = set(read(folder / "baby.train.inter")["item_id:token"])
    assert tokens == {"Weird, Al", "Net, The", "a b", "c,1", "d"}


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("baby.inter", "userID\titemID\n0\t0\n", r"baby.inter, line 1: no column 'x_label', only userID, itemID"),
        ("baby.inter", "userID,itemID,x_label\n0,0,0\n", r"line 1: no column 'userID'.*check the separator"),
        ("baby.inter", "userID\titemID\tx_label\n0\t0\t0\n0\t1\t5\n", "line 3: 'x_label' must be 0, 1 or 2, not '5'"),
        ("baby.inter", "userID\titemID\tx_label\n0\t0\t0\n\n0\tx\t1\n", "line 4: 'itemID' must be a number, not 'x'"),
        (
            "baby.inter",
            "userID\titemID\tx_label\n0\t0\t0\n0\t-1\t1\n",
            "line 3: 'itemID' must be a whole number from 0",
        ),
        ("baby.inter", "userID\titemID\tx_label\n0\t0\t0\n0\t1\n", "line 3: 2 values, but the first line names 3"),
        ("baby.inter", "userID\titemID\tx_label\n0\t0\t0\n0\t0\t2\n", r"no line has x_label 1 \(valid\)"),
        ("baby.inter", "userID\titemID\tx_label\n", "holds nothing but its first line"),
        ("baby.inter", "", "baby.inter is empty"),
        ("more.inter", "x", "must hold one .inter file, not baby.inter, more.inter"),
        ("i_id_mapping.csv", "asin\titemID\na\t0\nb\t1\na\t2\n", "line 4: the name 'a' is there twice"),
        ("i_id_mapping.csv", "asin\titemID\na\t0\nb\t0\n", "line 3: the number '0' is there twice"),
        ("i_id_mapping.csv", "asin\titemID\na\t0\nb\n", "line 3: must read 'name, tab, number', not 'b'"),
        (
            "i_id_mapping.csv",
            "asin\titemID\na\t0\nb\t1\n",
            r"baby.inter, line 4: itemID 2 is not among the 2 of .*i_id",
        ),
        ("i_id_mapping.csv", "asin\titemID\n\t0\n", "line 2: the name '' is empty or holds a tab"),
        ("i_id_mapping.csv", b"asin\titemID\na\t0\nMis\xe9rables\t1\n", "line 3: not UTF-8; convert it, e.g. iconv"),
        ("text_feat.npy", np.ones((4, 2)), "text_feat.npy has 4 rows, but there is an item 4"),
        ("text_feat.npy", np.array([[1.0]] * 4 + [[np.nan]]), "text_feat.npy, row 4: NaN or infinite"),
        ("text_feat.npy", b"PK", r"text_feat.npy cannot be read as a \.npy array of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_what_is_wrong_with_mmrec_s_files_is_named_and_nothing_is_written(mmrec, tmp_path, file, text, message):
    spoil(mmrec / file, text)
    expect_error(message, tmp_path / "out", lambda out: convert_mmrec(mmrec, out))


# -- KGAT --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kgat(tmp_path):
    """A small set in KGAT's layout, without lists of names: 20 users with 10 items each, 4 users with 4."""
    folder = tmp_path / "book"
    folder.mkdir()
    train = [[u, *range(u, u + 10)] for u in range(20)] + [[u, 0, 1, 2, 3] for u in range(20, 24)]
    (folder / "train.txt").write_text("".join(" ".join(map(str, line)) + "\n" for line in train))
    (folder / "test.txt").write_text("0 20 21 20 20\n1\n2 22 3\n")
    (folder / "kg_final.txt").write_text("0 0 40\n1 1 41\n0 0 40\n40 1 2\n")
    return folder


def test_kgat_s_oddities(kgat, tmp_path):
    summary = convert_kgat(kgat, tmp_path / "out")
    assert pairs(summary.folder / "book.test.inter") == [("0", "20"), ("0", "21"), ("2", "22"), ("2", "3")]
    assert rows(summary.folder / "book.kg") == [("0", "0", "40"), ("1", "1", "41"), ("40", "1", "2")]
    assert rows(summary.folder / "book.link") == [("0", "0"), ("1", "1"), ("2", "2")]
    assert summary.notes == [
        "test.txt: 2 repeated interactions left out",
        "1 test interactions are training interactions too; they are kept",
        "validation: 20 of 216 training interactions, a tenth of each user's, rounded, drawn with seed 2020; 4 users "
        "with fewer than five have none",
        "kg_final.txt: 1 repeated triples left out",
    ]


def test_the_validation_split_is_a_tenth_of_each_user_s_and_follows_the_seed(kgat, tmp_path):
    drawn = {}
    for seed in (1, 2):
        for out in ("a", "b"):
            folder = convert_kgat(kgat, tmp_path / f"{out}{seed}", seed=seed).folder
            drawn[out, seed] = pairs(folder / "book.valid.inter")
            train = read(folder / "book.train.inter")["user_id:token"].value_counts()
            assert [train[str(u)] for u in range(24)] == [9] * 20 + [4] * 4
        assert [user for user, _ in drawn["a", seed]] == sorted(str(u) for u in range(20))
        assert drawn["a", seed] == drawn["b", seed]
    assert drawn["a", 1] != drawn["a", 2]
    items = {int(item) - int(user) for user, item in drawn["a", 1]}
    assert len(items) > 4, "drawn anywhere among a user's items"


def test_a_missing_space_in_the_list_of_items_is_seen_through(kgat, tmp_path):
    names = [f"{i % 7}x{i}_" for i in range(40)]  # some start with a digit, as in yelp2018
    lines = [f"{name} {i}{name}" if i % 3 else f"{name} {i} m.{i}" for i, name in enumerate(names)]
    (kgat / "item_list.txt").write_text("\n".join(["org_id remap_id freebase_id", *lines]) + "\n")
    folder = convert_kgat(kgat, tmp_path / "out").folder
    assert pairs(folder / "book.test.inter") == sorted(
        (u, names[i]) for u, i in [("0", 20), ("0", 21), ("2", 22), ("2", 3)]
    )


def test_names_may_hold_spaces_and_numbers(kgat, tmp_path):
    (kgat / "item_list.txt").write_text("org_id remap_id\n" + "".join(f"Part {i} of 3 {i}\n" for i in range(40)))
    folder = convert_kgat(kgat, tmp_path / "out").folder
    assert ("2", "Part 22 of 3") in pairs(folder / "book.test.inter")


@pytest.mark.parametrize("size", [7, 40, 1 << 20])
def test_blocks_of_any_size_read_the_same(kgat, tmp_path, monkeypatch, size):
    expected = convert_kgat(kgat, tmp_path / "a")
    monkeypatch.setattr("recbole_slifmr.data.convert.source.BLOCK", size)
    monkeypatch.setattr("recbole_slifmr.data.convert.kgat.ROWS", size)
    summary = convert_kgat(kgat, tmp_path / "b")
    assert summary[1:] == expected[1:]
    for path in expected.folder.iterdir():
        assert (summary.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("train.txt", None, "train.txt not found"),
        ("train.txt", "", "train.txt is empty"),
        ("train.txt", "3\n4\n", "train.txt holds no interactions"),
        ("train.txt", "0 1 2\n\n1 2,3\n", "train.txt, line 3: must hold whole numbers with spaces.*not '1 2,3'"),
        ("train.txt", "0 1 99999999999999999999\n", "train.txt, line 1: must hold whole numbers"),
        ("train.txt", "0 1 2\n1 3 4\n", "leaves no interactions for validation"),
        ("test.txt", "0 1\n1 \xe9\n", "test.txt, line 2: must hold whole numbers"),
        ("kg_final.txt", "0 0 40\n1 1\n", "kg_final.txt, line 2: 2 numbers, but a triple is 'head relation tail'"),
        ("kg_final.txt", "\n", "kg_final.txt holds no triples"),
        ("kg_final.txt", None, r"kg_final.txt not found.*\(kg_final.zip will do too\)"),
        ("kg_final.txt", "100 0 101\n", "no item of .*train.txt is an entity"),
        ("user_list.txt", "org_id remap_id\na 0\nb 1\n", "train.txt, line 3: user 2 is not among the 2 of .*user_list"),
        ("entity_list.txt", "org_id remap_id\na b 0\nc 1\n", "kg_final.txt, line 4: entity 40 is not among the 2"),
        ("item_list.txt", "org_id remap_id\na 0\nb x\n", "item_list.txt, line 3: must read 'name number', not 'b x'"),
        ("relation_list.txt", "org_id remap_id\na 0\na 1\n", "relation_list.txt, line 3: the name 'a' is there twice"),
        ("relation_list.txt", b"org_id remap_id\na 0\n\xff 1\n", "relation_list.txt, line 3: not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_what_is_wrong_with_kgat_s_files_is_named_and_nothing_is_written(kgat, tmp_path, file, text, message):
    spoil(kgat / file, text)
    expect_error(message, tmp_path / "out", lambda out: convert_kgat(kgat, out))


def test_an_archive_without_triples_is_named(kgat, tmp_path):
    (kgat / "kg_final.txt").unlink()
    (kgat / "kg_final.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"kg_final.zip cannot be unpacked"):
        convert_kgat(kgat, tmp_path / "out")
    with zipfile.ZipFile(kgat / "kg_final.zip", "w") as archive:
        archive.writestr("other.txt", "0 0 1\n")
    with pytest.raises(DataError, match=r"kg_final.zip holds no kg_final.txt"):
        convert_kgat(kgat, tmp_path / "out")


TRIPLES = "0 0 1\n"
ARCHIVES = {
    "a name above": ({"../kg_final.txt": TRIPLES}, r"names a file outside itself, '\.\./kg_final\.txt'"),
    "another above": ({"kg_final.txt": TRIPLES, "a/../../x": ""}, r"names a file outside itself, 'a/\.\./\.\./x'"),
    "an absolute name": ({"/kg_final.txt": TRIPLES}, r"names a file outside itself, '/kg_final\.txt'"),
    "two of them": ({"kg_final.txt": TRIPLES, "a/kg_final.txt": TRIPLES}, "holds 2 files kg_final.txt"),
    "zeros": ({"kg_final.txt": bytes(1 << 26)}, "would unpack to 67,108,864 bytes, more than 100 times"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_of_triples_writes_nothing_and_is_refused_in_a_line(kgat, tmp_path, case):
    members, message = ARCHIVES[case]
    (kgat / "kg_final.txt").unlink(missing_ok=True)
    with zipfile.ZipFile(kgat / "kg_final.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=f"kg_final.zip {message}"):
        convert_kgat(kgat, tmp_path / "out")
    assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "out"] == before


def test_a_line_without_end_is_refused(kgat, monkeypatch):
    monkeypatch.setattr(source, "BLOCK", 64)
    monkeypatch.setattr(source, "LONGEST_LINE", 256)
    (kgat / "kg_final.txt").write_text("0 0 0\n" + "1 " * 1000)
    with pytest.raises(DataError, match=r"kg_final\.txt, line 2: longer than 256 bytes"):
        convert_kgat(kgat, kgat.parent / "out")


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path):
    """CSV files with columns of any name, and features."""
    folder = tmp_path / "csv"
    folder.mkdir()
    interactions = [f"u{k % 7},b{k % 5},{k % 4 + 1},{1000 + k}" for k in range(35)]
    (folder / "shop.csv").write_text("who,what,stars,when\n" + "\n".join(interactions) + "\n")
    (folder / "items.csv").write_text(
        'what,title,price,genre\nb0,"Tea, green",3.5,drink\nb1,"a ""b""",,food\nb2,"two\nlines",2,food\nb3,x,1,\n'
        "b4,y,9,food\n"
    )
    (folder / "kg.csv").write_text("head_id,relation_id,tail_id\nb0,is,x\nb1,is,x\nx,of,y\n")
    np.save(folder / "image.npy", np.arange(10, dtype=np.float16).reshape(5, 2))
    return folder


SHOP = Columns(user="who", item="what", rating="stars", time="when")


def convert_shop(folder, out, **files):
    return convert_tables(folder / "shop.csv", out, columns=SHOP, **files)


def test_lines_may_end_with_carriage_returns(tables, tmp_path):
    text = (tables / "shop.csv").read_text()
    for name, end in (("unix", "\n"), ("mac", "\r"), ("windows", "\r\n")):
        (tables / "shop.csv").write_bytes(text.replace("\n", end).encode())
        convert_tables(tables / "shop.csv", tmp_path / "out", name, columns=SHOP)
    unix, *others = (tmp_path / "out" / name / f"{name}.inter" for name in ("unix", "mac", "windows"))
    assert all(other.read_bytes() == unix.read_bytes() for other in others)


def test_a_column_with_infinity_is_no_column_of_numbers(tables, tmp_path):
    (tables / "items.csv").write_text("what,age,size\nb0,1,1\nb1,inf,2\nb2,2,3\n")
    folder = convert_shop(tables, tmp_path / "out", items=tables / "items.csv").folder
    assert read(folder / "shop.item").columns.tolist() == ["item_id:token", "age:token", "size:float"]


def test_items_keep_their_columns_with_recbole_s_types(tables, tmp_path):
    folder = convert_shop(tables, tmp_path / "out", items=tables / "items.csv").folder
    assert read(folder / "shop.inter").columns.tolist() == [
        "user_id:token", "item_id:token", "rating:float", "timestamp:float",
    ]  # fmt: skip
    items = read(folder / "shop.item")
    assert items.columns.tolist() == ["item_id:token", "title:token_seq", "price:float", "genre:token"]
    assert items["title:token_seq"].tolist() == ["Tea, green", 'a "b"', "two lines", "x", "y"]


def test_tokens_that_read_like_missing_values_are_converted_and_loaded(tables, tmp_path):
    for file in ("shop.csv", "items.csv", "kg.csv"):
        text = (tables / file).read_text().replace("b1", "NA").replace("b3", "nan").replace("u2", "null")
        (tables / file).write_text(text)
    summary = convert_shop(tables, tmp_path / "out", items=tables / "items.csv", triples=tables / "kg.csv")
    assert ("NA", "NA") in rows(summary.folder / "shop.link")
    config = make_config("SLIFMR", "shop", settings={**QUIET, "data_path": str(tmp_path / "out")})
    dataset = create_dataset(config)
    assert set(dataset.field2id_token["item_id"]) == {"[PAD]", "b0", "NA", "b2", "nan", "b4"}
    assert "null" in dataset.field2id_token["user_id"] and len(dataset.inter_feat) == 35
    assert set(dataset.item2entity) == {"b0", "NA"}


def test_items_that_are_entities_are_linked(tables, tmp_path):
    summary = convert_shop(tables, tmp_path / "out", triples=tables / "kg.csv")
    assert rows(summary.folder / "shop.link") == [("b0", "b0"), ("b1", "b1")]
    assert (summary.n_entities, summary.n_relations, summary.n_triples, summary.n_linked) == (4, 2, 3, 2)


def test_features_of_several_files_are_put_in_one_order(tables, tmp_path):
    frame = pa.table({"what": ["b4", "b0", "b9"], "v": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]})
    pa.parquet.write_table(frame, tables / "text.parquet")
    wide = pa.table({"x": [1, 2], "what": ["b1", "b2"], "y": [0.5, 0.25]})
    pa.parquet.write_table(wide, tables / "audio.parquet")
    files = {name: tables / f"{name}.{kind}" for name, kind in
             (("image", "npy"), ("text", "parquet"), ("audio", "parquet"))}  # fmt: skip
    summary = convert_shop(tables, tmp_path / "out", items=tables / "items.csv", features=files)
    assert summary.covered == {"image": (2, 5), "text": (3, 2), "audio": (2, 2)}
    ids = {"[PAD]": 0, **{f"b{k}": k + 1 for k in range(5)}}
    loaded = load_features(find_modalities(summary.folder), summary.folder, ItemFile(Path("none"), "item_id"), ids)
    assert loaded["image"].values[1:].flatten().tolist() == list(range(10))
    assert loaded["text"].values[[1, 5]].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert loaded["text"].mask.tolist() == [False, True, False, False, False, True]
    assert loaded["audio"].values[[2, 3]].tolist() == [[1, 0.5], [2, 0.25]]
    assert np.load(summary.folder / "image.npy").dtype == np.float16


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            "shop.csv",
            "who,what,stars\nu,b,1\n",
            "shop.csv, line 1: no column 'when', only who, what, stars.*--time-col",
        ),
        ("shop.csv", "what,stars,when\nb,1,2\n", "no column 'who', only what, stars, when: name it with --user-column"),
        ("shop.csv", "who,what,stars,when\nu,b,1,2\n,b,1,2\n", "shop.csv, line 3: 'who' is empty .''.: mend"),
        ("shop.csv", "who,what,stars,when\nu,b,1,2\nu,b,NA,2\n", "line 3: 'stars' must be a number, not 'NA'"),
        ("shop.csv", 'who,what,stars,when\nu,b,1,2\nu,"a\tb",1,2\n', "line 3: 'what' holds a tab or a line break"),
        ("shop.csv", "who,what,stars,when\nu,b,1,2\nu,b,good,2\n", "line 3: 'stars' must be a number, not 'good'"),
        ("shop.csv", "who,what,stars,when\nu,b,1,2\nu,b,-inf,2\n", "line 3: 'stars' must be a number, not '-inf'"),
        ("shop.csv", f"who,what,stars,{'w' * 200_000}\nu,b,1,2\n", "line 1 cannot be read: field larger than"),
        ("shop.csv", "who,what,stars,when\nu,b,1,2\nu,b,1,2,3\n", "line 3: 5 values, but the first line names 4"),
        ("shop.csv", b"who,what,stars,when\nu,b,1,2\nu,\xe9,1,2\n", "shop.csv, line 3: not UTF-8"),
        ("shop.csv", b"who\xe9,what,stars,when\nu,b,1,2\n", "shop.csv, line 1: not UTF-8"),
        ("shop.csv", "who,what,stars,when\n", "holds nothing but its first line"),
        ("items.csv", "what,title\nb0,x\nb1,y\nb0,z\n", "items.csv, line 4: 'what' 'b0' is there twice"),
        ("items.csv", "what,title\nc0,x\n", "none of its 1 items .such as 'c0'. has an interaction"),
        ("items.csv", "what,a:b\nb0,x\n", "line 1: the column 'a:b' cannot keep its name beside 'item_id:token'"),
        ("items.csv", "what,item_id\nb0,x\n", "line 1: the column 'item_id' cannot keep its name"),
        ("items.csv", "what,a,a\nb0,x,y\n", "items.csv, line 1: the column 'a' is there twice"),
        ("kg.csv", "head_id,relation_id,tail_id\nx,is,y\n", "no item is a head or tail of .*: give --links"),
        ("kg.csv", "head_id,relation_id,tail_id\nb0,is,\n", "kg.csv, line 2: 'tail_id' is empty"),
        ("image.npy", np.ones((4, 2)), "image.npy has 4 rows but .*items.csv names 5 items"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_what_is_wrong_with_tables_is_named_and_nothing_is_written(tables, tmp_path, file, text, message):
    spoil(tables / file, text)
    files = {"items": tables / "items.csv", "triples": tables / "kg.csv", "features": {"image": tables / "image.npy"}}
    expect_error(message, tmp_path / "out", lambda out: convert_shop(tables, out, **files))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"id": ["b0"], "x": [1.0]}, "has no column 'what', only id, x: name the items' column with --item-column"),
        ({"what": ["b0"], "x": ["y"]}, "either columns of numbers or one column of lists"),
        ({"what": ["b0", "b1"], "x": [[1.0], [1.0, 2.0]]}, r"f.parquet: item 'b1' has 2 numbers, others have 1"),
        ({"what": ["b0", "b0"], "x": [1.0, 2.0]}, "row 1: item 'b0' is there twice"),
        ({"what": ["c"], "x": [1.0]}, "none of its 1 items .such as 'c'. has an interaction"),
        ({"what": ["b0"], "x": [float("nan")]}, "row 0: NaN or infinite"),
    ],
    ids=str,
)
def test_what_is_wrong_with_parquet_features_is_named(tables, tmp_path, columns, message):
    pa.parquet.write_table(pa.table(columns), tables / "f.parquet")
    with pytest.raises(DataError, match=message):
        convert_shop(tables, tmp_path / "out", features={"text": tables / "f.parquet"})


def test_links_without_triples_and_odd_modalities_are_refused(tables, tmp_path):
    with pytest.raises(SettingError, match="give --triples too"):
        convert_shop(tables, tmp_path / "out", links=tables / "kg.csv")
    with pytest.raises(SettingError, match="'kg' cannot be a modality's name"):
        convert_shop(tables, tmp_path / "out", features={"kg": tables / "image.npy"})


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["book", "book[1]"])
def test_a_data_set_is_replaced_only_when_asked(kgat, tmp_path, name):
    out = tmp_path / "out"
    convert_kgat(kgat, out, name, seed=1)
    valid = out / name / f"{name}.valid.inter"
    before = valid.read_text()
    (out / name / "stale.npy").write_bytes(b"")
    with pytest.raises(DataError, match="is there already: choose another --name or --out, or --force"):
        convert_kgat(kgat, out, name, seed=2)
    assert valid.read_text() == before
    convert_kgat(kgat, out, name, seed=2, force=True)
    assert valid.read_text() != before
    assert not (out / name / "stale.npy").exists(), "features of another conversion may be in another order"
    assert [path.name for path in out.iterdir()] == [name]


def test_force_spares_folders_that_are_no_data_sets(kgat, tmp_path):
    with pytest.raises(DataError, match="is not just a data set: --force does not replace it"):
        convert_kgat(kgat, tmp_path, "book", force=True)
    assert (kgat / "train.txt").is_file()


def test_a_conversion_that_fails_leaves_the_old_data_set(kgat, tmp_path):
    folder = convert_kgat(kgat, tmp_path / "out").folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (kgat / "kg_final.txt").write_text("0 0\n")
    with pytest.raises(DataError):
        convert_kgat(kgat, tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["book"]


def test_an_interrupted_conversion_leaves_nothing(kgat, tmp_path):
    def open_file(path):
        if path.name == "kg_final.txt":
            raise KeyboardInterrupt
        return path.open("rb")

    with pytest.raises(KeyboardInterrupt):
        convert_kgat(kgat, tmp_path / "out", open_file=open_file)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["a/b", "a b", ".a", "it's"])
def test_odd_names_are_refused(kgat, tmp_path, name):
    with pytest.raises(SettingError, match="cannot be the name of a data set"):
        convert_kgat(kgat, tmp_path / "out", name)


# -- the commands ------------------------------------------------------------------------------------------------------


def slifmr(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, *capsys.readouterr()


def test_each_command_shows_progress_a_summary_and_how_to_train(kgat, mmrec, tables, tmp_path, capsys):
    code, out, err = slifmr(capsys, "convert", "kgat", kgat, "--out", tmp_path / "out", "--seed=3")
    assert code == 0 and "read train.txt" in err and "write kg" in err and "100%" in err
    assert re.search(r"interactions │ +220 \(196 / 20 / 4\)", out) and re.search(r"linked items │ +3 \(10.3%\)", out)
    assert "drawn with seed 3" in out
    line = f"slifmr train --model=SLIFMR --data_path={tmp_path}/out --dataset=book"
    assert out.splitlines()[-1] == f'{line} --benchmark_filename="[train, valid, test]"'
    code, out, err = slifmr(capsys, "convert", "mmrec", mmrec, "--out", tmp_path / "out", "--name", "kids")
    assert code == 0 and re.search(r"text \(3\) +│ +5 items \(100.0%\)", out) and (tmp_path / "out" / "kids").is_dir()
    arguments = ["--interactions", tables / "shop.csv", "--user-column=who", "--item_column", "what",
                 "--rating-column=stars", "--out", tmp_path / "out"]  # fmt: skip
    features = f"--features=image={tables}/image.npy"
    code, out, err = slifmr(capsys, "convert", "csv", *arguments, "--items", tables / "items.csv", features)
    assert code == 0 and out.endswith("--dataset=shop\n")
    assert read(tmp_path / "out" / "shop" / "shop.inter").shape == (35, 3)
    code, out, err = slifmr(capsys, "convert", "csv", *arguments, "--separator=;", "--force")
    assert code == 2 and "error:" in err and "no column 'who', only who,what,stars,when" in err
    code, out, err = slifmr(capsys, "convert", "csv", *arguments, "--features=image")
    assert code == 2 and "--features reads name=file" in err
    code, out, err = slifmr(capsys, "convert", "csv", *arguments, "--separator=ab")
    assert code == 2 and "--separator must be one character" in err


def test_what_was_converted_trains_with_the_line_it_prints(tmp_path):
    folder = fixed_split(write_tiny(tmp_path / "by hand", n_users=30))
    lay_out_mmrec(folder, tmp_path / "raw")
    summary = convert_mmrec(tmp_path / "raw", tmp_path / "out")
    lay_out_kgat(folder, tmp_path / "book")
    book = convert_kgat(tmp_path / "book", tmp_path / "out")
    for path in (summary.folder / "items.txt", *summary.folder.glob("*.npy")):
        path.rename(book.folder / path.name)  # MMRec's features beside KGAT's graph
    code = "import shlex, sys; from recbole_slifmr.cli import main; main(shlex.split(sys.argv[1])[1:] + sys.argv[2:])"
    fast = ["--epochs=1", "--show_progress=False", "--topk=[5]", "--valid_metric=Recall@5", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-c", code, book.command, *fast], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    assert "SLIFMR on book" in log and "modality text: dimension 6" in log and "14 of 15 items linked" in log
