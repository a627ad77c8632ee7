"""Splits by time and what they need: exact order, the columns that settings name, and what is left of every split."""

from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, write_table

from recbole_slifmr.data.atomic import write_atomic
from recbole_slifmr.data.survey import survey
from recbole_slifmr.data.survey_report import remarks
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import load_data, run

START = 1_700_000_000_000  # milliseconds since 1970: as float32 they tie over two minutes
RATIO, LEAVE, MOMENT = {"RS": [0.6, 0.2, 0.2]}, {"LS": "valid_and_test"}, {"TS": [0.6, 0.2, 0.2]}


def eval_args(split, order="TO", group_by="user"):
    return {"eval_args": {"split": split, "order": order, "group_by": group_by, "mode": "full"}}


def config_of(folder, model="SLIFMR", **settings):
    return make_config(model, folder.name, settings={**QUIET, "data_path": str(folder.parent), **settings})


def load(folder, model="SLIFMR", **settings):
    """Return the training, validation and test splits, as data sets."""
    return [loader._dataset for loader in load_data(config_of(folder, model, **settings))]


def rows_of(data):
    """Return user, item and time of every interaction, in order."""
    users, items = (data.field2id_token[f][data.inter_feat[f].numpy()].tolist() for f in ("user_id", "item_id"))
    return list(zip(users, items, data.inter_feat["timestamp"].tolist(), strict=True))


def add_columns(folder, times, ratings=None):
    """Give every interaction a time and a rating."""
    header, *lines = (folder / "tiny.inter").read_text().splitlines()
    ratings = [1 + n % 5 for n in range(len(lines))] if ratings is None else ratings
    rows = [[*line.split("\t"), rating, time] for line, rating, time in zip(lines, ratings, times, strict=True)]
    write_table(folder / "tiny.inter", f"{header}\trating:float\ttimestamp:float", rows)
    return rows


@pytest.fixture
def timed(tiny):
    """The tiny set with ratings, and times in another order than the file's."""
    add_columns(tiny, START + np.random.default_rng(0).permutation(140))
    return tiny


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [RATIO, LEAVE, MOMENT], ids=lambda split: next(iter(split)))
def test_nothing_in_training_is_younger_than_what_is_held_out(timed, split):
    train, valid, test = (rows_of(part) for part in load(timed, **eval_args(split)))
    assert sorted(int(t) for *_, t in train + valid + test) == list(range(START, START + 140)), "times are exact"
    for user in {user for user, *_ in train}:
        ages = [[t for u, _, t in part if u == user] for part in (train, valid, test)]
        for earlier, later in ((ages[0], ages[1]), (ages[0] + ages[1], ages[2])):
            assert max(earlier, default=0) < min(later, default=2 * START)


@pytest.mark.parametrize("split", [RATIO, LEAVE], ids=lambda split: next(iter(split)))
def test_equal_times_stay_in_the_order_of_the_file(tiny, split):
    rows = [tuple(row[:2]) for row in add_columns(tiny, [START] * 140)]
    parts = [[(user, item) for user, item, _ in rows_of(part)] for part in load(tiny, **eval_args(split))]
    for user in {user for user, _ in rows}:
        own = [pair for pair in rows if pair[0] == user]
        assert [pair for part in parts for pair in part if pair[0] == user] == own


def test_no_user_of_ml_100k_is_tested_on_an_older_item_than_one_in_training():
    settings = {**QUIET, "use_kg": False, "use_features": False, **eval_args({"RS": [0.8, 0.1, 0.1]})}
    train, _, test = (loader._dataset for loader in load_data(make_config("BPR", "ml-100k", settings=settings)))
    lines = (Path(train.dataset_path) / "ml-100k.inter").read_text().splitlines()[1:]
    times = {(user, item): int(time) for user, item, _, time in (line.split("\t") for line in lines)}
    last = {}
    for user, item, _ in rows_of(train):
        last[user] = max(last.get(user, 0), times[user, item])
    assert not [user for user, item, _ in rows_of(test) if times[user, item] < last[user]]


@pytest.mark.parametrize("keep, wanted", [("first", "1"), ("last", "3")])
def test_of_repeated_interactions_at_one_time_the_order_of_the_file_says_which_is_kept(tiny, keep, wanted):
    """Many rows at a few times: NumPy's quick sort leaves these in any order."""
    pairs = [(f"u{u}", f"i{(u + k) % 15}") for u in range(60) for k in range(10)]
    rows = [(*pair, rating, START + n % 7) for rating in (1, 2, 3) for n, pair in enumerate(pairs)]
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows)
    load_col = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    parts = load(tiny, rm_dup_inter=keep, load_col=load_col)
    assert sum(len(part) for part in parts) == len(pairs)
    assert {f"{r:g}" for part in parts for r in part.inter_feat["rating"].tolist()} == {wanted}


def test_times_beyond_what_can_be_told_apart_are_named(tiny):
    add_columns(tiny, [1_700_000_000_000_000_000 + k for k in range(140)])
    with pytest.raises(DataError, match=r"'timestamp' has numbers above 2\^53.*: give microseconds instead"):
        load(tiny, **eval_args(RATIO))


# -- columns ---------------------------------------------------------------------------------------------------------


def test_columns_that_settings_name_are_loaded(timed):
    plain = sum(len(part) for part in load(timed))
    liked = load(timed, val_interval={"rating": "[3,inf)"})
    assert plain == 140 and sum(len(part) for part in liked) == 84
    assert all(part.inter_feat["rating"].min() >= 3 for part in liked)
    assert "timestamp" in load(timed, **eval_args(RATIO))[0].inter_feat
    labels = load(timed, threshold={"rating": 4})[0].inter_feat["label"]
    assert set(labels.tolist()) == {0.0, 1.0}


def test_a_saved_data_set_is_not_used_by_a_split_that_needs_more_columns(timed):
    assert "timestamp" not in load(timed, save_dataset=True)[0].inter_feat
    assert "timestamp" in load(timed, **eval_args(RATIO))[0].inter_feat


MISSING = {
    "time": (eval_args(RATIO), r"eval_args: order TO needs the column 'timestamp', which neither .*tiny\.inter nor"),
    "moment": (eval_args(MOMENT), r"order TO needs the column 'timestamp'"),
    "value": ({"val_interval": {"rating": "[3,inf)"}}, r"val_interval needs the column 'rating', .*: check its name"),
    "label": ({"threshold": {"rating": 3}}, r"threshold needs the column 'rating', .*load_col and unload_col"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_column_that_is_not_there_is_named(tiny, case):
    settings, message = MISSING[case]
    with pytest.raises(DataError, match=message) as error:
        load(tiny, **settings)
    assert "\n" not in str(error.value)


def test_times_that_are_tokens_are_refused(timed):
    path = timed / "tiny.inter"
    path.write_text(path.read_text().replace("timestamp:float", "timestamp:token"))
    with pytest.raises(DataError, match="'timestamp' must be timestamp:float to sort by it, not timestamp:token"):
        load(timed, **eval_args(RATIO))


# -- settings --------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "two shares": (eval_args({"RS": [0.9, 0.1]}, "RO"), r"split RS must be three shares.*not \[0.9, 0.1\]"),
    "a negative share": (eval_args({"TS": [0.9, -0.1, 0.2]}), "split TS must be three shares"),
    "by time in any order": (eval_args(MOMENT, "RO"), "split TS is a split by time: add order: TO"),
    "no interval": ({"user_inter_num_interval": "[5;inf)"}, r"'\[5;inf\)' is no interval: write it as \[5,inf\)"),
    "no number": ({"item_inter_num_interval": "[five,inf)"}, "is no interval"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_are_named(timed, case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(SettingError, match=message):
        load(timed, **settings)


EMPTY = {
    "users": ({"user_inter_num_interval": "[50,inf)"}, r"inter: .*; widen user_inter_num_interval: \[50,inf\)$"),
    "items": ({"item_inter_num_interval": "[90,inf)"}, r"inter: .*; widen item_inter_num_interval: \[90,inf\)$"),
    "values": ({"val_interval": {"rating": "[6,9]"}}, r"tiny\.inter: nothing of it is left .*; widen val_interval: "),
    "entities": ({"entity_kg_num_interval": "[50,inf)"}, r"tiny\.kg: .*; widen entity_kg_num_interval: \[50,inf\)$"),
}


def test_items_that_the_item_file_lacks_are_named(tiny):
    write_table(tiny / "tiny.item", "item_id:token\tyear:float", [("other", 1990)])
    with pytest.raises(
        DataError, match=r"tiny\.inter: nothing of it .*; its users or items are not in \.user or \.item"
    ):
        load(tiny, load_col={"inter": ["user_id", "item_id"], "item": ["item_id", "year"]})


@pytest.mark.parametrize("case", EMPTY)
def test_filters_that_leave_nothing_are_named_with_the_file(timed, case):
    settings, message = EMPTY[case]
    with pytest.raises(DataError, match=message):
        load(timed, **settings)


# -- splits without something ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [{"RS": [0.9, 0, 0.1]}, {"LS": "test_only"}], ids=str)
def test_without_validation_the_last_epoch_is_tested_and_a_line_says_so(tiny, caplog, split):
    result = run(
        "BPR", "tiny", settings={**QUIET, "state": "INFO", "data_path": str(tiny.parent), **eval_args(split, "RO")}
    )
    assert "no interactions of 'tiny' are left for validation: " in caplog.text
    assert "the last one is tested" in caplog.text
    assert result.curve == [] and "recall@10" in result.test
    assert read_checkpoint(result.checkpoint)["epoch"] == QUIET["epochs"] - 1


def test_without_a_test_split_a_model_trains_but_is_not_compared(tiny, caplog):
    settings = {**QUIET, "state": "INFO", "data_path": str(tiny.parent), **eval_args({"RS": [0.9, 0.1, 0]}, "RO")}
    assert run("BPR", "tiny", settings=settings).test == {}
    assert "no interactions of 'tiny' are left for testing: there are no test scores" in caplog.text
    with pytest.raises(DataError, match="the test split of 'tiny' is empty: check eval_args"):
        run("BPR", "tiny", settings={**settings, "epochs": 10**6}, detailed=True)  # before training


def test_users_with_one_interaction_have_it_in_training(tiny, caplog):
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token", [(f"u{u}", f"i{u % 15}") for u in range(30)])
    with caplog.at_level("WARNING"):
        assert [len(part) for part in load(tiny)] == [30, 0, 0]
    assert "left for validation" in caplog.text and "left for testing" in caplog.text
    result = run("SLIFMR", "tiny", settings={**QUIET, "data_path": str(tiny.parent), **eval_args(RATIO, "RO", "none")})
    assert 0 <= result.test["recall@10"] <= 1, "without groups some of the interactions are held out"


# -- one moment for everybody ----------------------------------------------------------------------------------------


@pytest.fixture
def newcomers(tiny):
    """Three users and two items that come after the rest, and users who are gone by then."""
    lines = (tiny / "tiny.inter").read_text().splitlines()[1:]
    rows = [(*line.split("\t"), START + n) for n, line in enumerate(lines)]
    rows += [(f"new{n % 3}", f"late{n % 2}" if n < 6 else f"i{n % 15}", START + 200 + n) for n in range(18)]
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token\ttimestamp:float", rows)
    return tiny


SPLIT = eval_args({"TS": [0.8, 0.1, 0.1]})


@pytest.mark.parametrize("model", ["SLIFMR", "BPR", "KGAT", "EASE", "LightGCN", "LATTICE"])
def test_a_split_at_one_moment_trains_and_scores_newcomers(newcomers, model):
    settings = {**QUIET, "data_path": str(newcomers.parent), **SPLIT, "epochs": 1}
    result = run(model, "tiny", settings=settings, detailed=True)
    assert set(result.per_user.index) == {"new0", "new1", "new2"}
    assert result.per_user.notna().all().all()


def test_inspect_counts_newcomers(newcomers):
    config = config_of(newcomers, **SPLIT)
    splits = dict(zip(("train", "valid", "test"), (x._dataset for x in load_data(config)), strict=True))
    found = survey(config, splits, n_pairs=500)
    assert found["counts"]["test"]["users"] == found["unseen"]["test"]["users"] == 3
    assert any("3 users of test (100.0%) are not in training" in line for line in remarks(found))


@pytest.mark.parametrize(
    "settings", [{"cold_items": 0.2}, {"noise": {"interaction_add": 0.2, "interaction_drop": 0.1}}]
)
def test_cold_items_and_noise_leave_a_split_at_one_moment_in_order(newcomers, settings):
    clean, changed = load(newcomers, **SPLIT), load(newcomers, **SPLIT, **settings)
    for part, other in zip(clean[1:], changed[1:], strict=True):
        kept = set(rows_of(part)) - set(rows_of(other))
        assert not kept, "what was held out stays so"
    assert set(rows_of(changed[0])) != set(rows_of(clean[0]))


def test_exact_times_survive_being_written(timed):
    parts = load(timed, **eval_args(RATIO))
    folder = write_atomic(parts, timed.parent / "out", "tiny")
    settings = {
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    assert [sorted(rows_of(part)) for part in load(folder, **settings)] == [sorted(rows_of(part)) for part in parts]
