"""The synthetic shop of the benchmarks: a sparse set on which content says something."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import shop
from recbole_slifmr.data.convert.target import SPLITS


def make(out, *options):
    return CliRunner().invoke(shop.main, [f"--out={out}", "--name=little", *options])


SMALL = ("--users=400", "--items=150", "--seed=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("shops")
    done = make(out, *SMALL)
    assert done.exit_code == 0
    words = done.output.replace(",", "").split()
    return out / "little", {name: int(count) for count, name in zip(words[::2], words[1::2], strict=True)}


def table(folder, kind):
    return pd.read_csv(folder / f"{folder.name}.{kind}", sep="\t")


def test_the_splits_are_disjoint_and_together_a_5_core(made):
    folder, counts = made
    tables = [table(folder, f"{split}.inter") for split in SPLITS]
    pairs = pd.concat(tables)
    assert not pairs.duplicated().any()
    assert len(pairs) == counts["interactions"]
    assert pairs["user_id:token"].value_counts().min() >= 5
    assert pairs["item_id:token"].value_counts().min() >= 5
    for part in tables[1:]:
        assert part["user_id:token"].nunique() == counts["users"], "everybody has something to be asked for"


def test_every_item_has_a_text_a_brand_and_a_category(made):
    folder, counts = made
    items = (folder / "items.txt").read_text().split()
    assert len(items) == counts["items"] == len(np.load(folder / "text.npy"))
    links, triples = table(folder, "link"), table(folder, "kg")
    assert set(links["item_id:token"]) == set(items)
    for relation in ("brand", "category"):
        assert set(triples.loc[triples["relation_id:token"] == relation, "head_id:token"]) == set(
            links["entity_id:token"]
        )
    assert triples["tail_id:token"].str.startswith("department").sum() == shop.DEPARTMENTS * shop.CATEGORIES_EACH


def test_what_a_user_takes_is_alike(made):
    folder, _ = made
    text = np.load(folder / "text.npy")
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    row = {item: k for k, item in enumerate((folder / "items.txt").read_text().split())}
    taken = table(folder, "train.inter").groupby("user_id:token")["item_id:token"]
    taken = [[row[item] for item in items] for _, items in taken]

    def likeness(vectors):
        return np.mean([(vectors[rows] @ vectors[rows].T).mean() for rows in taken])

    alike, chance = likeness(text), likeness(np.random.default_rng(0).permutation(text))
    assert alike > chance + 0.03


def test_a_seed_gives_one_shop_and_another_seed_another(made, tmp_path):
    folder, _ = made
    assert make(tmp_path / "a", *SMALL).exit_code == make(tmp_path / "b", *SMALL[:2], "--seed=4").exit_code == 0
    again, other = tmp_path / "a" / "little", tmp_path / "b" / "little"
    files = sorted(path.name for path in folder.iterdir())
    assert [(again / name).read_bytes() for name in files] == [(folder / name).read_bytes() for name in files]
    assert not table(folder, "train.inter").equals(table(other, "train.inter"))


def test_what_cannot_be_is_said_in_one_line(made, tmp_path):
    for out, options, message in ((tmp_path, ("--users=3", "--items=50"), "take more users"),
                                  (made[0].parent, (), "is there already")):  # fmt: skip
        done = make(out, *options)
        assert done.exit_code == 2
        assert message in done.output.splitlines()[-1]
    assert not any(tmp_path.iterdir())
