"""``slifmr extract``, as a person runs it; sentence-transformers is a stand-in."""

import json
import sys
import types

import numpy as np
import pytest
from conftest import write_table, write_tiny
from PIL import Image

from recbole_slifmr.cli import _invoke, slifmr
from recbole_slifmr.data.extract import CLIP, tfidf_vectors
from recbole_slifmr.data.features import load_features
from recbole_slifmr.data.vectors import ItemFile
from recbole_slifmr.errors import DataError

TITLES = {"i3": "red apple pie", "i0": "green apple", "i9": "", "i4": "blue sky over the sea", "i5": "sea and sky"}


@pytest.fixture
def work(tmp_path):
    """A data set whose items.txt belongs to other features, of which one has no title."""
    tiny = write_tiny(tmp_path)
    rows = [(token, title, "fruit" if "apple" in title else "") for token, title in TITLES.items()]
    write_table(tiny / "tiny.item", "item_id:token\ttitle:token_seq\tgenre:token", rows)
    return tiny


class Encoder:
    """Encodes a text as its length, an image as its first pixel; breaks after ``left`` batches."""

    batches: list[list] = []
    left = 1000

    def __init__(self, model):
        if "none" in model:
            raise OSError(f"{model} is not a local folder\nand is not a model of huggingface.co")

    def encode(self, batch, batch_size, show_progress_bar, convert_to_numpy):
        assert len(batch) <= batch_size and not show_progress_bar and convert_to_numpy
        if Encoder.left == 0:
            raise KeyboardInterrupt
        Encoder.left -= 1
        Encoder.batches.append(list(batch))
        return np.array([[len(x), 1.0] if isinstance(x, str) else x.getpixel((0, 0)) for x in batch])


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Encoder))
    monkeypatch.setattr(Encoder, "batches", [])
    monkeypatch.setattr(Encoder, "left", 1000)
    return Encoder


def run(work, *arguments):
    return _invoke(slifmr, "slifmr", ["extract", *arguments, "--dataset=tiny", f"--data_path={work.parent}"])


def features(work, name):
    """What the loader makes of the files, by token."""
    ids = {f"i{i}": i + 1 for i in range(15)}
    found = load_features({name: f"{name}.npy"}, work, ItemFile(work / "tiny.item", "item_id"), {"[PAD]": 0} | ids)[
        name
    ]
    return {token: found.values[i].tolist() for token, i in ids.items() if found.mask[i]}


def test_text_by_tfidf(work, capsys):
    image = features(work, "image")
    assert run(work, "text", "--fields=title,genre", "--dim=3", "--name=words") == 0
    assert "4 items x 3: " in capsys.readouterr().out
    vectors = features(work, "words")
    assert set(vectors) == {"i3", "i0", "i4", "i5"}
    cosine = {other: np.dot(vectors["i3"], vectors[other]) for other in ("i0", "i4", "i5")}
    assert cosine["i0"] > 0.1 and abs(cosine["i4"]) < 1e-6, "apple pie is an apple and no sky"
    assert features(work, "image") == image, "other modalities keep their items.txt"
    card = json.loads((work / "words.json").read_text())
    assert card.pop("date") and card == {
        "name": "words", "items": 4, "dimension": 3, "model": "TF-IDF + truncated SVD", "fields": ["title", "genre"],
        "dataset": "tiny",
    }  # fmt: skip
    before = (work / "words.npy").read_bytes()
    assert run(work, "text", "--fields=title,genre", "--dim=3", "--name=words", "--overwrite") == 0
    assert (work / "words.npy").read_bytes() == before, "the same on every run"


def test_features_of_the_folder_s_own_name_replace_them_with_their_tokens(work):
    """text.npy has belonged to items.txt: afterwards it belongs to text.ids.txt."""
    assert run(work, "text", "--fields=title", "--overwrite") == 0
    assert set(features(work, "text")) == {"i3", "i0", "i4", "i5"}
    assert len(features(work, "image")) == 14


def test_text_by_a_model(work, encoder):
    assert run(work, "text", "--fields=title", "--model=m", "--name=words", "--batch_size=3") == 0
    assert features(work, "words") == {token: [len(title), 1.0] for token, title in TITLES.items() if title}
    assert [len(batch) for batch in encoder.batches] == [3, 1]
    assert json.loads((work / "words.json").read_text())["model"] == "m"
    assert not list(work.glob(".*")), "no parts are left"


def test_an_interrupted_run_goes_on(work, encoder):
    arguments = ("text", "--fields=title", "--model=m", "--name=words", "--batch_size=1")
    encoder.left = 3
    assert run(work, *arguments) == 130
    assert not (work / "words.npy").exists()
    encoder.left = 1000
    _change(work / "tiny.item", "red apple pie", "red apple tart")
    assert run(work, *arguments) == 0
    titles = [title for (title,) in encoder.batches]
    assert titles == ["red apple pie", "green apple", "blue sky over the sea", "red apple tart", "sea and sky"]
    assert features(work, "words")["i3"] == [14.0, 1.0]


def _change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_images(work, encoder, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(["i5.png", "i0.BMP", "other.png"]):
        Image.new("L" if i else "RGB", (4, 4), 7 * i if i else (1, 2, 3)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    assert run(work, "image", f"--folder={folder}", "--name=picture") == 0
    assert features(work, "picture") == {"i0": [7, 7, 7], "i5": [1, 2, 3]}
    assert json.loads((work / "picture.json").read_text())["model"] == CLIP
    (folder / "i4.jpg").write_bytes((folder / "i5.png").read_bytes()[:40])
    assert run(work, "image", f"--folder={folder}", "--name=picture", "--overwrite") == 2
    assert features(work, "picture") == {"i0": [7, 7, 7], "i5": [1, 2, 3]}, "a failed run leaves the old features"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["text", "--fields=title,nope"], "tiny.item has no column 'nope', only item_id, title, genre"),
        (["text", "--fields=title"], "text.npy is there already: give another --name, or --overwrite it"),
        (["text", "--fields=,"], "--fields names no column"),
        (["text", "--fields=title", "--name=kg"], "--name: 'kg' cannot be a modality's name"),
        (["text", "--fields=title", "--model=m", "--dim=3"], "--dim is of TF-IDF vectors"),
        (["text", "--fields=title", "--name=t", "--model=none"], "the model none cannot be loaded"),
        (["image", "--folder=nowhere", "--name=t"], "there is no folder nowhere"),
        (["image", "--folder=.", "--name=t"], "none of its 0 images is named by an item token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_line(work, encoder, capsys, arguments, message):
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    assert run(work, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_two_images_of_an_item_are_named(work, encoder, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("i0.png", "i0.bmp"):
        Image.new("RGB", (1, 1)).save(folder / name)
    assert run(work, "image", f"--folder={folder}", "--name=t") == 2
    assert "i0.bmp and i0.png are of the same item: leave one" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(work, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert run(work, "text", "--fields=title", "--model=m", "--name=t") == 2
    assert "pip install 'recbole-slifmr[encoders]'" in capsys.readouterr().err


def test_texts_without_words_are_named():
    with pytest.raises(DataError, match="the texts of the 2 items hold no words"):
        tfidf_vectors(["!", "the"])
