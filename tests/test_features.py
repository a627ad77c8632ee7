"""Files of item vectors and their join with the items."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUIET, write_table
from recbole.data.interaction import Interaction

from recbole_slifmr.data.features import load_features
from recbole_slifmr.data.vectors import ItemFile
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import MODELS
from recbole_slifmr.training.experiment import prepare

NO_FEATURES = ("XSimGCL", "LightKG", "AdaKG", "IALS")
FEATURE_MODELS = [model for model in MODELS if model not in NO_FEATURES]
TOKENS = ["a", "b", "7", "é"]
IDS = {"[PAD]": 0, "7": 1, "é": 2, "c": 3, "a": 4, "b": 5}  # c has no row
ROWS = np.array([[1, 2, 3], [0, -1, 0.5], [4, 4, 4], [9, 0, 1]], dtype=np.float32)


def load(folder, source, missing="mask"):
    item_file = ItemFile(folder / "set.item", "item_id")
    return load_features({"text": source}, folder, item_file, IDS, missing)["text"]


def write_ids(path, tokens=TOKENS):
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def frame(**columns):
    return pd.DataFrame({"item_id": TOKENS, **columns})


def numbers():
    return frame(x=ROWS[:, 0], y=ROWS[:, 1], z=ROWS[:, 2])


def _write_npy(folder):
    np.save(folder / "x.npy", ROWS)
    write_ids(folder / "items.txt")
    return "x.npy"


def _write_own_ids(folder):
    """Those of the file go before those of the folder."""
    np.save(folder / "x.npy", ROWS[::-1])
    write_ids(folder / "items.txt")
    write_ids(folder / "x.ids.txt", TOKENS[::-1])
    return "x.npy"


def _write_npz(folder):
    np.savez(folder / "x.npz", ids=np.array(TOKENS), anything=ROWS.astype(np.float64))
    return "x.npz"


def _write_bytes_npz(folder):
    np.savez(folder / "x.npz", ids=np.array([token.encode() for token in TOKENS]), values=ROWS, more=np.ones(3))
    return "x.npz"


def _write_npz_and_list(folder):
    np.savez_compressed(folder / "x.npz", ROWS)
    write_ids(folder / "mine")
    return {"file": "x.npz", "ids": "mine"}


def _write_pt(folder):
    torch.save(torch.tensor(ROWS).requires_grad_(), folder / "x.pt")
    write_ids(folder / "x.ids.txt")
    return {"file": "x.pt"}


def _write_pt_dict(folder):
    torch.save({"ids": TOKENS, "embeddings": torch.tensor(ROWS).bfloat16(), "model": "m"}, folder / "x.pth")
    return "x.pth"


def _write_old_pt(folder):
    torch.save({"ids": TOKENS, "values": torch.tensor(ROWS)}, folder / "x.pt", _use_new_zipfile_serialization=False)
    return "x.pt"


def _write_parquet(folder):
    numbers().set_index(pd.Index([3, 5, 6, 9])).to_parquet(folder / "x.parquet")
    return "x.parquet"


def _write_parquet_lists(folder):
    table = frame(vector=list(ROWS), title="t").rename(columns={"item_id": "asin"})
    pd.concat([table, pd.DataFrame({"asin": ["c"]})]).to_parquet(folder / "x.parquet")  # c has no list
    return {"file": "x.parquet", "ids": "asin", "field": "vector"}


def _write_csv(folder):
    numbers().to_csv(folder / "x.csv", index=False)
    return "x.csv"


def _write_tsv(folder):
    numbers().rename(columns={"item_id": "id"}).to_csv(folder / "x.tsv", index=False, sep="\t")
    return {"file": "x.tsv", "ids": "id"}


def _write_atomic(folder, name="set.textemb"):
    rows = [(token, " ".join(map(str, row))) for token, row in zip(TOKENS, ROWS, strict=True)]
    write_table(folder / name, "item_id:token\ttext_vec:float_seq", rows)
    return {"file": name, "field": "text_vec"}


def _write_item_field(folder):
    _write_atomic(folder, "set.item")
    return {"field": "text_vec"}


def _write_item_order(folder):
    np.save(folder / "x.npy", ROWS)
    write_table(folder / "set.item", "item_id:token", [(token,) for token in TOKENS])
    return "x.npy"


FORMATS = [value for name, value in list(globals().items()) if name.startswith("_write_")]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__.removeprefix("_write_"))
def test_rows_are_joined_by_token(tmp_path, write):
    values, mask = load(tmp_path, write(tmp_path))
    assert mask.tolist() == [False, True, True, False, True, True]
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), [[0, 0, 0], ROWS[2], ROWS[3], [0, 0, 0], ROWS[0], ROWS[1]])


def test_whole_numbers_are_tokens(tmp_path):
    np.savez(tmp_path / "x.npz", ids=np.array([7, 8]), values=ROWS[:2])
    torch.save({"ids": torch.tensor([8, 7]), "values": torch.tensor(ROWS[:2])}, tmp_path / "x.pt")
    pd.DataFrame({"item_id": [8, 7], "v": [1.0, 2.0]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("item_id,v\n8,1\n7,2\n")
    firsts = [load(tmp_path, f"x.{suffix}").values[1, 0].item() for suffix in ("npz", "pt", "parquet", "csv")]
    assert firsts == [1, 0, 2, 2]


@pytest.mark.parametrize("kind", ["<f8", ">f8", "f2", "i8", "i1", "u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_kind_of_number_in_any_order_is_read(tmp_path, kind, order):
    rows = np.array([[1, 2, 3], [0, 1, 5], [4, 4, 4], [9, 0, 1]])
    np.save(tmp_path / "x.npy", np.asarray(rows, dtype=kind, order=order))
    write_ids(tmp_path / "items.txt")
    values, mask = load(tmp_path, "x.npy")
    assert values.dtype == torch.float32 and mask.sum() == 4
    np.testing.assert_array_equal(values[[4, 5, 1, 2]].numpy(), rows)


def test_what_was_found_is_logged(tmp_path, caplog):
    rows = np.concatenate([ROWS, ROWS[[0]], np.zeros((1, 3)), [[np.nan] * 3]])
    np.save(tmp_path / "x.npy", rows)  # a row of an item that the set does not have may be anything
    write_ids(tmp_path / "items.txt", [*TOKENS, "a", "c", "unseen"])
    with caplog.at_level("INFO"):
        load(tmp_path, "x.npy")
    assert caplog.messages == [
        "modality text: dimension 3, 4 of 5 items (80.0%); x.npy by items.txt; 1 rows of other items; "
        "1 repeated rows; 1 rows of zeros; 1 items lack it"
    ]


# -- items without a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_row", [False, True], ids=["no row", "a row of zeros"])
@pytest.mark.parametrize("missing, wanted", [("mean", ROWS.mean(0)), ("zero", [0, 0, 0])])
def test_items_without_a_row_are_filled(tmp_path, missing, wanted, zero_row):
    np.save(tmp_path / "x.npy", np.concatenate([ROWS, np.zeros((1, 3))]) if zero_row else ROWS)
    write_ids(tmp_path / "items.txt", [*TOKENS, "c"] if zero_row else TOKENS)
    for values, mask in (load(tmp_path, "x.npy", missing), load(tmp_path, {"file": "x.npy", "missing": missing})):
        assert mask.tolist() == [False, True, True, True, True, True]
        np.testing.assert_allclose(values[3].numpy(), wanted)
        assert not values[0].any()
        np.testing.assert_array_equal(values[4].numpy(), ROWS[0])


@pytest.mark.parametrize("missing", ["mean", "zero"])
@pytest.mark.parametrize("model", FEATURE_MODELS)
def test_models_train_on_filled_items(tiny, model, missing):
    settings = {**QUIET, "epochs": 1, "data_path": str(tiny.parent), "feature_missing": missing}
    prepared = prepare(make_config(model, "tiny", settings=settings))
    data = prepared.train_data._dataset
    values, mask = data.item_features["text"]
    assert mask[1:].all() and not mask[0]
    assert bool(values[data.token2id("item_id", "i1")].any()) == (missing == "mean")
    prepared.trainer.fit(prepared.train_data, prepared.valid_data, show_progress=False)
    assert all(parameter.isfinite().all() for parameter in prepared.trainer.model.parameters())


ODD = {
    "identical rows": np.ones((15, 4)),
    "cosines all negative": 15 * np.eye(15) - 1,
    "one item": np.eye(15)[:, [3]],
    "large numbers": 1e18 * np.random.default_rng(0).normal(size=(15, 4)),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize(
    "model, settings",
    [(model, {}) for model in FEATURE_MODELS]
    + [(model, {"knn_k": 1000}) for model in ("SLIFMR", "LATTICE", "FREEDOM", "MSCA", "MGCN", "SMORE")],
)
def test_models_train_on_odd_features_and_with_more_neighbours_than_items(tiny, model, settings, case):
    np.save(tiny / "text.npy", ODD[case])
    settings = {**QUIET, "epochs": 1, "data_path": str(tiny.parent), "modalities": {"text": "text.npy"}, **settings}
    prepared = prepare(make_config(model, "tiny", settings=settings))
    prepared.trainer.fit(prepared.train_data, prepared.valid_data, show_progress=False)
    prepared.trainer.model.eval()
    with torch.no_grad():
        scores = prepared.trainer.model.full_sort_predict(Interaction({"user_id": torch.arange(1, 21)})).view(20, -1)
    assert scores.isfinite().all() and (scores[:, 1:].std(dim=1) > 0).all()


# -- big files -------------------------------------------------------------------------------------------------------


def test_a_row_that_no_item_needs_is_not_read(tmp_path, monkeypatch):
    """The file is mapped: of 100 blocks the two that hold rows of the items are read, and no more."""
    from recbole_slifmr.data import features

    monkeypatch.setattr(features, "BLOCK", 3)
    read = []
    blocks = features._blocks

    def spy(values, rows):
        assert isinstance(values, np.memmap)
        for part, block in blocks(values, rows):
            read.extend(part)
            yield part, block

    monkeypatch.setattr(features, "_blocks", spy)
    np.save(tmp_path / "x.npy", np.arange(300, dtype=np.float32).reshape(100, 3))
    write_ids(tmp_path / "items.txt", [*(f"other{i}" for i in range(98)), "b", "a"])
    values, _ = load(tmp_path, "x.npy")
    assert values[5].tolist() == [294, 295, 296] and values[4].tolist() == [297, 298, 299]
    assert read == [98, 99]


# -- bad input -------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _spoil(write, change):
    def spoil(folder):
        source = write(folder)
        change(folder / (source if isinstance(source, str) else source["file"]))
        return source

    return spoil


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _with(values, tokens=TOKENS, name="x.npy"):
    def write(folder):
        np.save(folder / name, values)
        write_ids(folder / "items.txt", tokens)
        return name

    return write


def _csv(text):
    def write(folder):
        (folder / "x.csv").write_text(text)
        return "x.csv"

    return write


def _parquet(table, **source):
    def write(folder):
        table.to_parquet(folder / "x.parquet")
        return {"file": "x.parquet", **source}

    return write


def _pt(content):
    def write(folder):
        torch.save(content, folder / "x.pt")
        return "x.pt"

    return write


def _npz(**arrays):
    def write(folder):
        np.savez(folder / "x.npz", **arrays)
        return "x.npz"

    return write


def nan_rows():
    rows = ROWS.copy()
    rows[2, 1] = np.nan
    return rows


BAD = {
    "NaN": (_with(nan_rows()), r"x\.npy: NaN or infinite 'text' features in 1 rows, first item '7'"),
    "beyond float32": (_with(np.full((4, 2), 1e39)), r"NaN or infinite 'text' features in 4 rows, first item 'a'"),
    "rows that differ": (
        _with(np.concatenate([ROWS, ROWS[[0]] + 1]), [*TOKENS, "a"]),
        r"x\.npy: item 'a' has more than one row in the 'text' features, and they differ",
    ),
    "lengths": (_with(ROWS, TOKENS[:3]), r"x\.npy has 4 rows but items\.txt names 3 items: they must correspond"),
    "unknown tokens": (_with(ROWS, list("wxyz")), r"none of its 4 items \(such as 'w'\) is in the data set"),
    "zeros": (_with(ROWS * 0), r"the 'text' features of every item are zero"),
    "complex": (_with(ROWS * 1j), r"must be a matrix of numbers .* not complex64"),
    "truncated .npy": (_spoil(_write_npy, _truncate), r"x\.npy cannot be read as a \.npy array"),
    "truncated .npz": (_spoil(_write_npz, _truncate), r"x\.npz cannot be read as an \.npz archive"),
    "truncated .pt": (_spoil(_write_pt_dict, _truncate), r"x\.pth cannot be read as a file of tensors"),
    "truncated .parquet": (_spoil(_write_parquet, _truncate), r"x\.parquet cannot be read as a parquet table"),
    "an archive named .npy": (_spoil(_write_npy, lambda p: np.savez(p.open("wb"), ROWS)), r"archive: name it \.npz"),
    "an array named .npz": (_spoil(_write_npz, lambda p: np.save(p.open("wb"), ROWS)), r"single array: name it \.npy"),
    "pickled .npy": (_with(np.array([[Code()]])), r"x\.npy cannot be read as a \.npy array of numbers"),
    "pickled .npz": (_npz(ids=np.array(TOKENS), values=np.array([[Code()]] * 4)), r"x\.npz cannot be read"),
    "pickled ids": (_npz(ids=np.array([Code()] * 4), values=ROWS), r"x\.npz cannot be read"),
    "code in .pt": (_pt({"ids": TOKENS, "values": Code()}), r"x\.pt cannot be read as a file of tensors: it must hold"),
    "a bare pickle": (
        _spoil(_write_pt, lambda path: path.write_bytes(pickle.dumps(Code(), 2))), r"x\.pt cannot be read as a file of"
    ),
    "no tensor": (_pt({"ids": TOKENS, "values": [1.0]}), r"x\.pt: it must hold a tensor, or a dict"),
    "no ids": (_pt({"ids": [1.5, 2.0], "values": torch.ones(2, 2)}), r"x\.pt: 'ids' must be a list of item tokens"),
    "two matrices": (_npz(a=ROWS, b=ROWS), r"must hold one matrix, named 'values' if other .*\['a', 'b'\]"),
    "no list of ids": (_pt(torch.ones(2, 2)), r"items\.txt not found: it should name the item of each feature row"),
    "a word": (_csv("item_id,x,y\na,1,2\nb,3,z\n"), r"x\.csv: 'y' of item 'b' is 'z' and no number"),
    "an empty cell": (_csv("item_id,x,y\na,1,2\nb,,3\n"), r"NaN or infinite .* first item 'b'"),
    "a short line": (_csv("item_id,x,y\na,1,2\nb,1\n"), r"NaN or infinite .* first item 'b'"),
    "a long line": (_csv("item_id,x,y\na,1,2\nb,1,2,3\n"), r"x\.csv cannot be read as a table"),
    "all lines long": (_csv("item_id,x\na,1,2\nb,1,2\n"), r"x\.csv cannot be read as a table"),
    "no column of tokens": (_csv("id,x\na,1\n"), r"x\.csv has no column 'item_id', only id, x: name the tokens' with"),
    "an index of pandas": (_csv(",item_id,x\n0,a,1\n"), r"x\.csv: column 1 has no name: name it or leave it out"),
    "a column twice": (_csv("item_id,x,x\na,1,2\n"), r"x\.csv: column 3 is a second 'x'"),
    "no numbers": (_csv("item_id\na\n"), r"x\.csv has no column beside 'item_id'"),
    "an empty table": (_csv(""), r"x\.csv cannot be read as a table"),
    "no rows": (_csv("item_id,x\n"), r"x\.csv holds no vectors"),
    "a column of words": (_parquet(frame(title="t", x=1.0)), r"column 'title' is .*string.*'field'"),
    "lists that differ": (_parquet(frame(v=[[1], [1, 2], [1], [1]])), r"item 'b' has 2 numbers, others have 1"),
    "lists of words": (_parquet(frame(v=[["x"]] * 4)), r"must be a matrix of numbers"),
    "a row without token": (
        _parquet(pd.DataFrame({"item_id": ["a", None], "x": [1.0, 2.0]})), r"row 2 has no 'item_id'"
    ),
    "an unknown format": (lambda folder: _write_atomic(folder)["file"], r"set\.textemb: the formats are \.npy, "),
    "field of an array": (lambda folder: {"file": _write_npy(folder), "field": "x"}, r"x\.npy has no columns"),
    "no such field": (lambda folder: {"file": _write_csv(folder), "field": "w"}, r"x\.csv has no column 'w', only"),
    "an unknown key": (lambda folder: {"file": _write_npy(folder), "id": "x"}, r"'text' has 'id', which is none"),
    "ids not found": (lambda folder: {"file": _write_npy(folder), "ids": "x"}, r"x not found: it should name the item"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_and_nothing_in_them_is_run(tmp_path, case):
    write, message = BAD[case]
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, write(tmp_path))
    assert "\n" not in str(error.value)
    assert not os.path.exists("executed")


@pytest.mark.parametrize("source", ["x.npy", {"file": "x.npy", "missing": "median"}], ids=["for all", "for one"])
def test_an_unknown_way_to_fill_is_named(tmp_path, source):
    with pytest.raises(SettingError, match="feature_missing must be one of mask, mean, zero, not 'median'"):
        _write_npy(tmp_path)
        load(tmp_path, source, "median" if source == "x.npy" else "mask")
