"""A data set written as atomic files is the same data set when it is read."""

import pytest
from conftest import write_table
from test_noise import EVERYTHING, load, pairs, triples

from recbole_slifmr.data.atomic import write_atomic
from recbole_slifmr.errors import DataError

SPLIT = {"benchmark_filename": ["train", "valid", "test"]}


def features(data):
    """Return the rows by modality and token."""
    tokens = data.field2id_token["item_id"]
    return {
        name: {str(tokens[i]): values[i].tolist() for i in mask.nonzero().flatten().tolist()}
        for name, (values, mask) in data.item_features.items()
    }


def rows_of(data):
    """Return user, item and the other columns of every interaction; those of evaluation are in no certain order."""
    columns = [data.field2id_token[f][data.inter_feat[f].numpy()].tolist() for f in ("user_id", "item_id")]
    columns += [data.inter_feat[f].tolist() for f in ("timestamp", "rating")]
    return sorted(zip(*columns, strict=True))


@pytest.mark.parametrize("noise", [{}, EVERYTHING], ids=["clean", "noisy"])
@pytest.mark.parametrize("settings", [{}, {"kg_reverse_r": True}], ids=["", "reverse"])
def test_splits_triples_links_and_features_are_read_as_they_were(tiny, noise, settings):
    parts = load(tiny, noise, **settings)
    folder = write_atomic(parts, tiny.parent / "out", "noisy")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["noisy"]
    again = load(folder, {}, **SPLIT, **settings)
    assert [pairs(part) for part in again] == [pairs(part) for part in parts]
    assert triples(again[0]) == triples(parts[0])
    known = {entity for head, _, tail in triples(parts[0]) for entity in (head, tail)}
    assert again[0].item2entity == {item: e for item, e in parts[0].item2entity.items() if e in known}
    assert features(again[0]) == features(parts[0])


def test_other_columns_and_odd_tokens(tiny):
    odd = {0: 'a "quoted" one', 1: "with, comma", 2: "with space", 3: "007"}
    lines = (tiny / "tiny.inter").read_text().splitlines()[1:]
    rows = [(*line.split("\t"), 881250949 + n, n / 7) for n, line in enumerate(lines)]
    rows = [(odd.get(int(user[1:]), user), *rest) for user, *rest in rows]
    rows = [('"' + user.replace('"', '""') + '"', *rest) for user, *rest in rows]
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token\ttimestamp:float\trating:float", rows)
    settings = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]}}
    parts = load(tiny, {"interaction_add": 0.3}, "LightGCN", **settings)
    folder = write_atomic(parts, tiny.parent / "out", "more")
    assert sorted(path.name for path in folder.iterdir()) == [f"more.{s}.inter" for s in ("test", "train", "valid")]
    again = load(folder, {}, "LightGCN", **SPLIT, **settings)
    assert set(odd.values()) < set(parts[0].field2id_token["user_id"])
    for one, other in zip(parts, again, strict=True):
        assert rows_of(one) == rows_of(other)


def test_nothing_is_overwritten_or_half_written(tiny):
    parts = load(tiny, {})
    folder = write_atomic(parts, tiny.parent / "out", "noisy")
    with pytest.raises(DataError, match="noisy is there already: remove it or choose another name"):
        write_atomic(parts, folder.parent, "noisy")
    with pytest.raises(ValueError):
        write_atomic(parts[:2], folder.parent, "half")
    assert [path.name for path in folder.parent.iterdir()] == ["noisy"]
