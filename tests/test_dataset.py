"""The data set: same ids and splits for every model, nothing lost, bad input named."""

import logging

import numpy as np
import pytest
import torch
from conftest import QUIET, write_table, write_tiny
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset, KnowledgeBasedDataset
from recbole.utils import init_seed

from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.experiment import load_data


def dataset_of(folder, model="SLIFMR", **settings):
    config = make_config(model, folder.name, settings={**QUIET, "data_path": str(folder.parent), **settings})
    init_seed(config["seed"], True)
    return create_dataset(config)


def split_of(dataset):
    init_seed(2020, True)
    loaders = data_preparation(dataset.config, dataset)
    return [
        sorted(zip(d._dataset.inter_feat["user_id"].tolist(), d._dataset.inter_feat["item_id"].tolist(), strict=True))
        for d in loaders
    ]


def test_every_model_gets_the_same_ids_and_splits(tiny):
    datasets = [dataset_of(tiny, model) for model in ("SLIFMR", "LightGCN", "KGAT", "BPR")]
    assert all(type(d) is SLIFMRDataset for d in datasets)
    for other in datasets[1:]:
        assert list(other.field2id_token["item_id"]) == list(datasets[0].field2id_token["item_id"])
        assert list(other.field2id_token["user_id"]) == list(datasets[0].field2id_token["user_id"])
    splits = [split_of(d) for d in datasets]
    assert all(split == splits[0] for split in splits)


def test_ids_and_splits_are_those_of_recbole_s_plain_data_set(tiny):
    ours = dataset_of(tiny, "LightGCN")
    init_seed(2020, True)
    plain = Dataset(ours.config)
    assert list(plain.field2id_token["item_id"]) == list(ours.field2id_token["item_id"])
    assert split_of(plain) == split_of(ours)


def test_no_interaction_is_dropped_for_want_of_an_entity(tiny):
    _bad(tiny, "tiny.link", lambda s: s.replace("stray\te1\n", ""))  # RecBole cannot take it
    ours = dataset_of(tiny, "KGAT")
    recbole = KnowledgeBasedDataset(ours.config)
    n_rows = len((tiny / "tiny.inter").read_text().splitlines()) - 1
    assert len(ours.inter_feat) == n_rows
    assert len(recbole.inter_feat) < n_rows, "RecBole's own class drops them: this test could not fail otherwise"


def test_triples_are_in_item_ids_and_stray_links_are_pruned(tiny):
    dataset = dataset_of(tiny)
    items, entities = dataset.field2token_id["item_id"], dataset.field2token_id["entity_id"]
    assert "stray" not in dataset.item2entity and "i0" not in dataset.item2entity
    assert len(dataset.item2entity) == 14
    tokens = dataset.field2id_token["entity_id"]
    relations = dataset.field2id_token["relation_id"]
    named = {(tokens[h], relations[r], tokens[t]) for h, r, t in dataset.triples.tolist()}
    lines = (tiny / "tiny.kg").read_text().splitlines()[1:]
    assert named == {tuple(line.split("\t")) for line in lines}
    for i in range(1, 15):
        assert entities[f"e{i}"] == items[f"i{i}"]
    assert min(entities[x] for x in ("x0", "x1", "x2", "x3", "y")) >= dataset.item_num
    assert dataset.entity_num == dataset.item_num + 5


def test_features_are_joined_by_token(tiny):
    dataset = dataset_of(tiny)
    assert list(dataset.item_features) == ["image", "text"]
    tokens = (tiny / "items.txt").read_text().split()
    rows = np.load(tiny / "text.npy")
    values, mask = dataset.item_features["text"]
    for token, row in zip(tokens, rows, strict=True):
        if token != "unseen":
            np.testing.assert_array_equal(values[dataset.token2id("item_id", token)].numpy(), row)
    assert not mask[0] and not mask[dataset.token2id("item_id", "i1")]
    assert mask.sum() == 14
    assert values[~mask].abs().sum() == 0


def test_features_in_the_order_of_the_item_file(tiny):
    write_table(tiny / "tiny.item", "item_id:token", [(f"i{i}",) for i in reversed(range(15))])
    (tiny / "items.txt").unlink()
    np.save(tiny / "text.npy", np.arange(15, dtype=np.float32)[:, None] + 1)
    dataset = dataset_of(tiny, modalities={"text": "text.npy"})
    assert dataset.item_features["text"].values[dataset.token2id("item_id", "i14")].item() == 1.0
    assert dataset.item_features["text"].values[dataset.token2id("item_id", "i0")].item() == 15.0


def test_features_from_a_float_seq_field(tiny):
    write_table(tiny / "tiny.item", "item_id:token\tvector:float_seq", [("i3", "1.5 2"), ("i4", ""), ("i5", "0 -1")])
    dataset = dataset_of(tiny, modalities={"audio": {"field": "vector"}})
    values, mask = dataset.item_features["audio"]
    assert values[dataset.token2id("item_id", "i3")].tolist() == [1.5, 2.0]
    assert mask.nonzero().squeeze(1).tolist() == sorted(dataset.token2id("item_id", ["i3", "i5"]).tolist())


def test_features_with_ids_of_their_own(tiny):
    (tiny / "mine.txt").write_text("i2\ni9")  # no newline at the end
    np.save(tiny / "few.npy", np.ones((2, 3)))
    dataset = dataset_of(tiny, modalities={"video": {"file": "few.npy", "ids": "mine.txt"}})
    assert dataset.item_features["video"].mask.sum() == 2


def test_a_zero_row_counts_as_missing(tiny):
    rows = np.load(tiny / "text.npy")
    rows[0] = 0
    np.save(tiny / "text.npy", rows)
    dataset = dataset_of(tiny)
    assert not dataset.item_features["text"].mask[dataset.token2id("item_id", "i0")]


def test_without_kg_and_features(tiny):
    dataset = dataset_of(tiny, use_kg=False, use_features=False)
    assert dataset.triples.shape == (0, 3) and dataset.item_features == {}
    assert dataset.entity_num == dataset.item_num
    for file in ("tiny.kg", "tiny.link", "text.npy", "image.npy"):
        (tiny / file).unlink()
    assert dataset_of(tiny).triples.shape == (0, 3)


def test_a_fixed_split_is_taken_as_it_is(tiny):
    lines = (tiny / "tiny.inter").read_text().splitlines()
    for name, part in (("a", lines[1:100]), ("b", lines[100:120]), ("c", lines[120:])):
        (tiny / f"tiny.{name}.inter").write_text("\n".join([lines[0], *part]) + "\n")
    dataset = dataset_of(tiny, benchmark_filename=["a", "b", "c"])
    assert [len(part) for part in split_of(dataset)] == [99, 20, len(lines) - 120]
    assert len(dataset.item2entity) == 14


def test_an_entity_linked_twice_belongs_to_the_first_item(tiny):
    _bad(tiny, "tiny.link", lambda s: s.replace("i0\tnowhere", "i0\te3"))
    dataset = dataset_of(tiny)
    assert dataset.item2entity["i3"] == "e3" and "i0" not in dataset.item2entity
    assert dataset.entity_num == dataset.item_num + 5


def test_what_a_person_needs_to_see_is_logged(tiny, caplog):
    with caplog.at_level("INFO"):
        dataset_of(tiny)
    text = caplog.text
    assert "knowledge graph: 16 triples, 3 relations, 19 entities, 14 of 15 items linked (93.3%)" in text
    assert "modality text: dimension 6, 14 of 15 items (93.3%)" in text
    assert "16 links: 2 lead to an unknown item or entity, 0 to an entity that another item has" in text


# -- bad input -------------------------------------------------------------------------------------------------------


def _bad(tiny, file, change):
    path = tiny / file
    path.write_text(change(path.read_text()))


def _nan(tiny):
    rows = np.load(tiny / "text.npy")
    rows[2, 1] = np.nan
    np.save(tiny / "text.npy", rows)


BAD = {
    "kg column": (
        lambda t: _bad(t, "tiny.kg", lambda s: s.replace("relation_id:token", "rel:token")),
        r"tiny\.kg has no column 'relation_id', only head_id, rel, tail_id",
    ),
    "inter column": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("user_id:token", "usr:token")),
        r"tiny\.inter has no column 'user_id'",
    ),
    "header without types": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("user_id:token", "user_id")),
        r"tiny\.inter: column 'user_id' of the first line must read name:type",
    ),
    "empty kg cell": (
        lambda t: _bad(t, "tiny.kg", lambda s: s.replace("e2\tr0\tx2", "e2\tr0\t")),
        r"tiny\.kg, line 3: 'tail_id' is empty",
    ),
    "no interactions": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.splitlines()[0] + "\n"),
        r"tiny\.inter holds no interactions",
    ),
    "no interaction file": (
        lambda t: (t / "tiny.inter").unlink(),
        r"tiny\.inter not found: put the interactions there",
    ),
    "no link file": (lambda t: (t / "tiny.link").unlink(), r"tiny\.link not found"),
    "links of another set": (
        lambda t: _bad(t, "tiny.link", lambda s: s.replace("\ni", "\nz")),
        r"tiny\.link: none of its 16 links joins an item",
    ),
    "wrong length": (
        lambda t: _bad(t, "items.txt", lambda s: s + "more\n"),
        r"text\.npy has 15 rows but .*items\.txt names 16 items|image\.npy has 15 rows but .*items\.txt names 16 items",
    ),
    "unknown ids only": (
        lambda t: _bad(t, "items.txt", lambda s: s.replace("i", "z")),
        r"\.npy: none of its 15 items \(such as 'z0'\) is in the data set",
    ),
    "an item twice": (
        lambda t: _bad(t, "items.txt", lambda s: s.replace("unseen", "i4")),
        r"\.npy: item 'i4' has more than one row",
    ),
    "NaN": (_nan, r"text\.npy: NaN or infinite 'text' features in 1 rows, first item 'i3'"),
    "no ids": (lambda t: (t / "items.txt").unlink(), r"items\.txt not found: it should name the item of each feature"),
    "an empty file": (lambda t: (t / "text.npy").write_bytes(b""), r"text\.npy cannot be read as a \.npy array"),
    "no dimension": (lambda t: np.save(t / "text.npy", np.ones((15, 0))), r"text\.npy must be a matrix of numbers"),
    "all zeros": (lambda t: np.save(t / "text.npy", np.zeros((15, 2))), r"'text' features of every item are zero"),
    "more values than columns": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("\nu", "\nx\tu")),
        r"tiny\.inter, line 2: 3 values, but the first line names 2 columns",
    ),
    "no links": (lambda t: _bad(t, "tiny.link", lambda s: s.splitlines()[0] + "\n"), r"tiny\.link holds no links"),
    "no triples": (lambda t: _bad(t, "tiny.kg", lambda s: s.splitlines()[0] + "\n"), r"tiny\.kg holds no triples"),
    "another encoding": (
        lambda t: (t / "tiny.inter").write_bytes(b"user_id:token\titem_id:token\n\xe9\ti1\n"),
        r"tiny\.inter, line 2, is not UTF-8 \(.*\): convert the file or set 'encoding'",
    ),
    "a stray quote": (
        lambda t: _bad(t, "tiny.inter", lambda s: s + '"u1\ti1\n'),
        r"tiny\.inter, line 142: a quotation mark",
    ),
    "another encoding in the middle": (
        lambda t: (t / "tiny.kg").write_bytes((t / "tiny.kg").read_bytes().replace(b"e7\t", b"e\xe97\t")),
        r"tiny\.kg, line 8, is not UTF-8",
    ),
    "16 bits": (lambda t: (t / "tiny.inter").write_text((t / "tiny.inter").read_text(), "utf-16"), r"is not UTF-8"),
    "16 bits without a mark": (
        lambda t: (t / "tiny.inter").write_text((t / "tiny.inter").read_text(), "utf-16-le"),
        r"tiny\.inter is no text, or its encoding is another",
    ),
    "zero bytes": (
        lambda t: _bad(t, "tiny.inter", lambda s: s + "u1\0\ti1\n"),
        r"tiny\.inter, line 142, holds a zero byte",
    ),
    "an empty table": (lambda t: (t / "tiny.inter").write_text(""), r"tiny\.inter is empty: its first line must name"),
    "a byte order mark alone": (lambda t: (t / "tiny.kg").write_bytes(b"\xef\xbb\xbf"), r"tiny\.kg is empty"),
    "an empty first line": (lambda t: _bad(t, "tiny.kg", lambda s: "\n" + s), r"tiny\.kg: the first line is empty"),
    "another separator": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("\t", ",")),
        r"column 'user_id:token,item_id:token' .* must read name:type, .*, with '\\t' \(field_separator\)",
    ),
    "another separator below the first line": (
        lambda t: _bad(t, "tiny.link", lambda s: s.replace("\t", " ").replace(" ", "\t", 1)),
        r"tiny\.link, line 2: 1 values, but the first line names 2 columns",
    ),
    "no such type": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("user_id:token", "user_id:str")),
        r"tiny\.inter: column 'user_id:str' .* must have one of the types token, ",
    ),
    "an id that is a number": (
        lambda t: _bad(t, "tiny.inter", lambda s: s.replace("user_id:token", "user_id:float")),
        r"tiny\.inter: column 'user_id' must be user_id:token, not user_id:float",
    ),
    "a column twice": (
        lambda t: _bad(t, "tiny.kg", lambda s: s.replace("tail_id", "head_id")),
        r"tiny\.kg: the first line names column 'head_id' twice",
    ),
    "too many values far down": (
        lambda t: _bad(t, "tiny.kg", lambda s: s.replace("e9\t", "e9\te9\t")),
        r"tiny\.kg, line 10: 4 values, but the first line names 3 columns",
    ),
    "too few values": (
        lambda t: _bad(t, "tiny.inter", lambda s: "\n".join(s.splitlines()[:-1]) + "\n\nu1\n"),
        r"tiny\.inter, line 142: 1 values, but the first line names 2 columns",
    ),
    "empty user": (lambda t: _bad(t, "tiny.inter", lambda s: s + "\n\ti1\n"), r"inter, line 143: 'user_id' is empty"),
    "empty entity": (lambda t: _bad(t, "tiny.link", lambda s: s + "i99\t\n"), r"link, line 18: 'entity_id' is empty"),
    "an item linked twice": (
        lambda t: _bad(t, "tiny.link", lambda s: s + "i1\te1\ni3\te4\n"),
        r"tiny\.link: lines 4 and 19 say different things of item_id 'i3': drop one",
    ),
    "not an array": (lambda t: (t / "text.npy").write_text("hello"), r"text\.npy cannot be read as a \.npy array"),
    "a vector": (lambda t: np.save(t / "text.npy", np.ones(15)), r"text\.npy must be a matrix of numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(tiny, case):
    spoil, message = BAD[case]
    spoil(tiny)
    with pytest.raises(DataError, match=message) as error:
        dataset_of(tiny)
    assert "\n" not in str(error.value)


def with_ratings(tiny, ratings):
    """Add a rating to every interaction: the given ones first, then 3."""
    header, *lines = (tiny / "tiny.inter").read_text().splitlines()
    rated = [f"{line}\t{dict(enumerate(ratings)).get(n, 3)}" for n, line in enumerate(lines)]
    (tiny / "tiny.inter").write_text("\n".join([f"{header}\trating:float", *rated]) + "\n")
    return {"load_col": {"inter": ["user_id", "item_id", "rating"]}}


@pytest.mark.parametrize(
    "rating, message",
    [
        ("", "line 3: 'rating' is missing: put a number there, drop the line or leave the column out"),
        ("NaN", "line 3: 'rating' is missing"),
        ("inf", "line 3: 'rating' is inf"),
        ("good", "line 3: 'good' in column 'rating' is no number"),
    ],
)
def test_a_rating_that_is_no_number_is_named(tiny, rating, message):
    settings = with_ratings(tiny, [1, rating])
    with pytest.raises(DataError, match=rf"tiny\.inter, {message}"):
        dataset_of(tiny, **settings)
    dataset_of(tiny, load_col={"inter": ["user_id", "item_id"]})  # what nobody reads does no harm


def test_two_different_rows_of_an_item_are_named(tiny):
    settings = {"load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "year"]}}
    write_table(tiny / "tiny.item", "item_id:token\tyear:float", [("i1", 1990), ("i2", ""), ("i1", 1990)])
    assert dataset_of(tiny, **settings).item_num == 3, "RecBole keeps the items of the file"
    write_table(tiny / "tiny.item", "item_id:token\tyear:float", [("i1", 1990), ("i2", ""), ("i1", 1991)])
    with pytest.raises(DataError, match=r"tiny\.item: lines 2 and 4 say different things of item_id 'i1'"):
        dataset_of(tiny, **settings)


GOOD = {
    "Windows lines": lambda b: b.replace(b"\n", b"\r\n"),
    "old Mac lines": lambda b: b.replace(b"\n", b"\r"),
    "a byte order mark": lambda b: b"\xef\xbb\xbf" + b,
    "both": lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n"),
    "no last line feed": lambda b: b.removesuffix(b"\n"),
    "blank lines": lambda b: b.replace(b"\n", b"\n\n  \n"),
    "quotation marks": lambda b: b.replace(b"e3", b'"e3"').replace(b"i4", b'"i4"'),
}


@pytest.mark.parametrize("case", GOOD)
def test_the_same_data_otherwise_written_loads_the_same(tiny, case):
    plain = dataset_of(tiny)
    for suffix in ("inter", "kg", "link"):
        path = tiny / f"tiny.{suffix}"
        path.write_bytes(GOOD[case](path.read_bytes()))
    other = dataset_of(tiny)
    assert plain.inter_feat.equals(other.inter_feat)
    assert torch.equal(plain.triples, other.triples) and plain.item2entity == other.item2entity
    for field in ("user_id", "item_id", "entity_id", "relation_id"):
        assert list(plain.field2id_token[field]) == list(other.field2id_token[field])


def test_tokens_that_read_like_missing_values_are_tokens(tiny):
    for file in ("tiny.inter", "tiny.kg", "tiny.link", "items.txt"):
        _bad(tiny, file, lambda s: s.replace("i4", "NA").replace("i3", "null").replace("e5", "None"))
    dataset = dataset_of(tiny)
    assert dataset.item_num - 1 == 15 and len(dataset.inter_feat) == 140
    assert dataset.item2entity["null"] == "e3" and dataset.item2entity["i5"] == "None"


ODD_TOKENS = ["1e5", "100000", "0x1f", "31", "nan", "-0", "0", "00", "inf", "True", "1.0", "1"]


def test_tokens_that_read_like_numbers_are_tokens(tiny):
    users, items = ODD_TOKENS, [*ODD_TOKENS[::-1], "x"]
    rows = [(user, items[(u + k) % 13]) for u, user in enumerate(users, 1) for k in range(1, 7)]
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token", rows)
    write_table(tiny / "tiny.kg", "head_id:token\trelation_id:token\ttail_id:token", [(t, "1e5", "nan") for t in items])
    write_table(tiny / "tiny.link", "item_id:token\tentity_id:token", [(t, t) for t in items])
    (tiny / "items.txt").write_text("".join(f"{item}\n" for item in items))
    np.save(tiny / "text.npy", np.arange(1, 27).reshape(13, 2))
    (tiny / "image.npy").unlink()
    (tiny / "table.csv").write_text("item_id,x\n" + "".join(f"{item},{n}\n" for n, item in enumerate(items, 1)))
    dataset = dataset_of(tiny, modalities={"text": "text.npy", "table": "table.csv"})
    assert sorted(dataset.field2id_token["user_id"][1:]) == sorted(users)
    assert sorted(dataset.field2id_token["item_id"][1:]) == sorted(items)
    assert dataset.item2entity == {item: item for item in items}
    for n, item in enumerate(items, 1):
        row = dataset.token2id("item_id", item)
        assert dataset.item_features["text"].values[row].tolist() == [2 * n - 1, 2 * n]
        assert dataset.item_features["table"].values[row].tolist() == [n]


@pytest.mark.parametrize("separator", [",", "||", "é"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_other_separators_and_encodings(tiny, separator, encoding):
    plain = dataset_of(tiny)
    for suffix in ("inter", "kg", "link"):
        path = tiny / f"tiny.{suffix}"
        path.write_text(path.read_text().replace("\t", separator), encoding=encoding)
    settings = {"field_separator": separator, "encoding": encoding}
    other = dataset_of(tiny, **settings)
    assert plain.inter_feat.equals(other.inter_feat) and torch.equal(plain.triples, other.triples)
    with pytest.raises(DataError, match="encoding: Python knows no 'klingon'"):
        dataset_of(tiny, **{**settings, "encoding": "klingon"})


BAD_SETTINGS = {
    "missing file": ({"modalities": {"text": "none.npy"}}, r"none\.npy not found: put the 'text' features there"),
    "no such folder": ({"feature_path": "nowhere"}, r"feature_path: there is no folder .*nowhere"),
    "a file of nothing": ({"modalities": {"text": {"file": None}}}, r"modalities: 'text' must be a file, "),
    "a name of torch's": ({"modalities": {"training": "text.npy"}}, r"'training' cannot be a modality's name"),
    "no modality map": ({"modalities": "text.npy"}, r"modalities must be 'auto' or a mapping"),
    "a name that is taken": ({"modalities": {"kg": "text.npy"}}, r"modalities: 'kg' cannot be a modality's name"),
    "a name that is no name": ({"modalities": {"my text": "text.npy"}}, r"'my text' cannot be a modality's name"),
    "odd source": ({"modalities": {"text": 3}}, r"modalities: 'text' must be a file, "),
    "field without item file": ({"modalities": {"text": {"field": "v"}}}, r"tiny\.item not found"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_modalities_are_named(tiny, case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(DataError, match=message):
        dataset_of(tiny, **settings)


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match="data set 'nothere' not found"):
        dataset_of(tmp_path / "nothere")


def test_a_kg_model_without_a_kg_is_told(tiny):
    (tiny / "tiny.kg").unlink()
    with pytest.raises(DataError, match=r"tiny\.kg not found: KGAT needs a knowledge graph"):
        dataset_of(tiny, "KGAT")


def test_an_empty_training_split_is_named(tiny):
    (tiny / "tiny.a.inter").write_text("user_id:token\titem_id:token\n")
    lines = (tiny / "tiny.inter").read_text()
    for name in "bc":
        (tiny / f"tiny.{name}.inter").write_text(lines)
    with pytest.raises(DataError, match=r"tiny\.a\.inter holds no interactions"):
        dataset_of(tiny, benchmark_filename=["a", "b", "c"])
    dataset = dataset_of(
        tiny, eval_args={"split": {"RS": [0, 0.5, 0.5]}, "group_by": None, "order": "RO", "mode": "full"}
    )
    with pytest.raises(DataError, match="the training split of 'tiny' is empty"):
        dataset.build()


def test_float_seq_of_unequal_length_is_named(tiny):
    write_table(tiny / "tiny.item", "item_id:token\tv:float_seq", [("i3", "1 2"), ("i4", "1 2 3")])
    with pytest.raises(DataError, match="'v' of item 'i4' has 3 numbers, others have 2"):
        dataset_of(tiny, modalities={"audio": {"field": "v"}})


# -- bundled sets ----------------------------------------------------------------------------------------------------


def test_ml_100k_works_out_of_the_box(tmp_path, monkeypatch):
    config = make_config("SLIFMR", "ml-100k", settings={**QUIET, "feature_path": str(tmp_path / "features")})
    dataset = create_dataset(config)
    assert (dataset.user_num - 1, dataset.item_num - 1, len(dataset.inter_feat)) == (943, 1682, 100_000)
    assert len(dataset.triples) == 91_631 and len(dataset.item2entity) == 1_598
    assert dataset.item_features["text"].mask.sum() == 1682
    written = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert written == ["text.ids.txt", "text.json", "text.npy"]
    before = np.load(tmp_path / "features" / "text.npy")
    (tmp_path / "features" / "text.npy").unlink()  # an interrupted first use is made good
    create_dataset(config)
    np.testing.assert_array_equal(np.load(tmp_path / "features" / "text.npy"), before)


def test_a_folder_for_the_features_of_ml_100k_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config("SLIFMR", "ml-100k", settings={**QUIET, "feature_path": str(tmp_path / "file" / "x")})
    with pytest.raises(SettingError, match="file/x: Not a directory; name another with --feature_path"):
        create_dataset(config)


def test_ml_100k_keeps_a_user_s_own_features(tmp_path):
    ids = "".join(f"{i}\n" for i in range(100, 0, -1))
    (tmp_path / "items.txt").write_text(ids)
    np.save(tmp_path / "image.npy", np.ones((100, 2)))
    settings = {**QUIET, "feature_path": str(tmp_path), "modalities": {"image": "image.npy"}}
    assert list(create_dataset(make_config("SLIFMR", "ml-100k", settings=settings)).item_features) == ["image"]
    assert (tmp_path / "items.txt").read_text() == ids
    assert not (tmp_path / "text.npy").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_token(tiny):
    (tiny / "items.txt").write_bytes(b"\xef\xbb\xbf" + (tiny / "items.txt").read_bytes())
    dataset = dataset_of(tiny)
    assert dataset.item_features["text"].mask[dataset.token2id("item_id", "i0")]


def test_a_saved_data_set_is_not_used_by_a_model_that_reads_more(tiny):
    load_col = {"inter": ["user_id", "item_id"]}
    dataset_of(tiny, "LightGCN", save_dataset=True, load_col=load_col)
    assert len(dataset_of(tiny, "KGAT", load_col=load_col).triples) == 16


def test_toy_files_are_what_the_script_makes(tmp_path):
    import runpy

    from recbole_slifmr.paths import ROOT

    toy = ROOT / "dataset_atomic" / "toy"
    runpy.run_path(str(toy / "make_toy.py"))["make_toy"](tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (toy / path.name).read_bytes(), path.name


def test_saved_data_set_is_not_used_for_other_features(tiny):
    first = dataset_of(tiny, save_dataset=True, use_features=False)
    assert first.item_features == {}
    assert torch.is_tensor(dataset_of(tiny).item_features["text"].values)


@pytest.mark.parametrize("saving", ["save_dataset", "save_dataloaders"])
def test_saved_data_are_not_used_once_their_files_have_changed(tiny, saving, monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger(), "warning", said.append)

    def n_training(**settings):
        config = make_config("SLIFMR", "tiny", settings={**QUIET, "data_path": str(tiny.parent), **settings})
        said.clear()
        return len(load_data(config)[0]._dataset)

    def is_refused():
        return any("is not used: the data have changed since it was saved" in line for line in said)

    before = n_training(**{saving: True})
    assert n_training() == before and not is_refused()
    _bad(tiny, "tiny.inter", lambda s: "".join(s.splitlines(keepends=True)[:100]))
    fewer = n_training()
    assert fewer < before and is_refused()
    assert n_training(**{saving: True}) == fewer
    assert n_training() == fewer and not is_refused()
    np.save(tiny / "text.npy", np.load(tiny / "text.npy") + 1)
    n_training()
    assert is_refused()


def test_saved_loaders_get_the_batch_size_that_goes_by_the_data(tiny):
    sizes = []
    for saving in ({"save_dataloaders": True}, {}):
        settings = {**QUIET, "data_path": str(tiny.parent), "train_batch_size": "auto", **saving}
        sizes.append(load_data(make_config("SLIFMR", "tiny", settings=settings))[0].config["train_batch_size"])
    assert sizes == [2048, 2048]


def test_loaders_that_recbole_cannot_save_are_refused(tiny):
    settings = {**QUIET, "data_path": str(tiny.parent), "save_dataloaders": True}
    with pytest.raises(SettingError, match="save_dataloaders: RecBole cannot save the loaders of KGAT"):
        load_data(make_config("KGAT", "tiny", settings=settings))


def test_write_tiny_is_seeded(tmp_path):
    a, b = write_tiny(tmp_path / "a"), write_tiny(tmp_path / "b")
    assert (a / "tiny.inter").read_text() == (b / "tiny.inter").read_text()
