"""Search spaces: reading, drawing, grids, conditions."""

import math

import numpy as np
import optuna
import pytest
import yaml

from recbole_slifmr.errors import SettingError
from recbole_slifmr.model import MODELS
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.search import space as spaces
from recbole_slifmr.search.plan import make_search

SPACE = """
learning_rate: {loguniform: [1e-4, 1e-2]}
dropout: {uniform: [0, 0.5]}
n_layers: {choice: [1, 2, 3]}
knn_k: {quniform: [5, 20, 5]}
temperature: {quniform: [0.1, 0.5, 0.1]}
refresh_k: {randint: [3, 6], if: {self_loop: true}}
self_loop: {choice: [true, false]}
layers: {choice: [[64], [64, 32]]}
"""


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return spaces.read_space(tmp_path / "space.yaml")


def test_numbers_are_read_as_the_field_writes_them(space):
    assert space["learning_rate"].values == (1e-4, 1e-2)
    assert space["knn_k"].steps == (5, 10, 15, 20) and all(type(k) is int for k in space["knn_k"].steps)
    assert space["temperature"].steps == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert space["refresh_k"].steps == (3, 4, 5), "the upper bound is left out, as in Ray and numpy"
    assert list(space).index("self_loop") < list(space).index("refresh_k"), "what is depended on comes first"


def test_drawn_points_lie_in_the_space_and_keep_its_conditions(space):
    rng = np.random.default_rng(0)
    points = [spaces.sample(space, rng) for _ in range(300)]
    for point in points:
        assert 1e-4 <= point["learning_rate"] <= 1e-2 and 0 <= point["dropout"] <= 0.5
        assert point["n_layers"] in (1, 2, 3) and point["layers"] in ([64], [64, 32])
        assert ("refresh_k" in point) == point["self_loop"]
    middle = np.median([point["learning_rate"] for point in points])
    assert 5e-4 < middle < 2e-3, "half of a log-uniform lies below its geometric mean"
    assert {point["knn_k"] for point in points} == {5, 10, 15, 20}


def test_a_draw_is_repeatable_and_without_repeats(space):
    first = {"self_loop": False}
    drawn = spaces.draw(space, 5, 1, first)
    assert drawn == spaces.draw(space, 5, 1, first) != spaces.draw(space, 5, 2, first)
    assert len(drawn) == 5 and drawn[0] is first
    small = spaces.parse_space({"a": {"choice": [1, 2]}, "b": {"choice": [1, 2]}})
    assert len(spaces.draw(small, 10, 0, {"a": 1, "b": 1})) == 4, "the space holds no more"


def test_a_search_starts_from_the_settings_as_they_are(space):
    values = dict.fromkeys(space) | {"learning_rate": 0.5, "self_loop": False, "refresh_k": 7}
    assert spaces.start(space, values) == {"learning_rate": 0.5, "self_loop": False}, "refresh_k needs the self-loop"
    assert spaces.start(space, values | {"self_loop": True})["refresh_k"] == 7


def test_a_grid_is_every_point_once():
    space = spaces.parse_space(
        {"a": {"choice": [True, False]}, "k": {"randint": [1, 3], "if": {"a": True}}, "q": {"quniform": [0, 1, 0.5]}}
    )
    points = spaces.grid(space)
    assert len(points) == 2 * 3 + 3
    assert {"a": False, "q": 0.5} in points and {"a": True, "k": 2, "q": 1.0} in points


def test_conditions_follow_one_another():
    space = spaces.parse_space(
        {
            "c": {"choice": [1], "if": {"b": ["x", "y"]}},
            "b": {"choice": ["x", "z"], "if": {"a": True}},
            "a": {"choice": [True, False]},
        }
    )
    assert spaces.grid(space) == [{"a": True, "b": "x", "c": 1}, {"a": True, "b": "z"}, {"a": False}]


def test_optuna_asks_for_the_same_values(space):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        point = spaces.suggest(space, "point/", trial)
        study.tell(trial, point["point/learning_rate"])
        assert point["point/layers"] in ([64], [64, 32]) and point["point/knn_k"] in (5, 10, 15, 20)
        assert ("point/refresh_k" in point) == point["point/self_loop"]
        assert 1e-4 <= point["point/learning_rate"] <= 1e-2
    assert study.best_value < 3e-4, "it learns that low is good"


def test_a_neighbour_moves_continuous_settings_alone(space):
    rng = np.random.default_rng(0)
    point = {"learning_rate": 1e-3, "dropout": 0.45, "n_layers": 2, "layers": [64]}
    moved = [spaces.perturb(space, point, rng) for _ in range(50)]
    assert all(p["n_layers"] == 2 and p["layers"] == [64] for p in moved), "they may change the shape of the model"
    assert {round(p["learning_rate"] / 1e-3, 6) for p in moved} >= {0.8, 1.2}
    assert all(1e-4 <= p["learning_rate"] <= 1e-2 and 0 <= p["dropout"] <= 0.5 for p in moved)


def test_recbole_s_files_are_read(tmp_path):
    """The format of RecBole's hyper.test; the bounds of its loguniform are logarithms."""
    (tmp_path / "model.hyper").write_text(
        "learning_rate loguniform -8,-4\ndropout_prob uniform 0.0,0.6\n\nembedding_size choice [32, 64]\n"
        "mlp_hidden_size choice ['[64,64]','[128,64]']\nn_layers quniform 1,3,1\n"
    )
    space = spaces.read_space(tmp_path / "model.hyper")
    assert space["learning_rate"].values == pytest.approx((math.exp(-8), math.exp(-4)))
    assert space["dropout_prob"].values == (0.0, 0.6) and space["embedding_size"].values == (32, 64)
    assert space["mlp_hidden_size"].values == ("[64,64]", "[128,64]") and space["n_layers"].steps == (1, 2, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 3", "a: expected one of choice, uniform, loguniform, quniform, randint with its values, not 3"),
        ("a: {normal: [0, 1]}", "a: expected one of choice"),
        ("a: {uniform: [0, 1], choice: [1]}", "a: expected one of choice"),
        ("a: {choice: []}", r"a: choice takes a list of values, not \[\]"),
        ("a: {uniform: [0]}", r"a: uniform takes \[low, high\], not \[0\]"),
        ("a: {uniform: [zero, 1]}", r"a: uniform takes \[low, high\]"),
        ("a: {quniform: [0, 1]}", r"a: quniform takes \[low, high, q\]"),
        ("a: {randint: [0, 1.5]}", "a: randint takes whole numbers"),
        ("a: {uniform: [1, 0]}", "low must be below high$"),
        ("a: {loguniform: [0, 1]}", "low must be below high and above 0"),
        ("a: {quniform: [0, 1, 0]}", "low must be below high and q above 0"),
        ("a: {choice: [1], if: b}", "a: 'if' reads"),
        ("a: {choice: [1], if: {b: 1}}", "a depends on 'b', which is not in the space"),
        ("a: {choice: [1], if: {b: 1}}\nb: {choice: [1], if: {a: 1}}", "a, b depend on each other in a circle"),
        ("just words", "holds no settings"),
        ("a: [1", "is not YAML"),
    ],
)
def test_a_space_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(SettingError, match=message) as error:
        spaces.read_space(tmp_path / "space.yaml")
    assert "space.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [("a choice [1,", "line 1: a: '.1,' cannot be read"), ("a normal 0,1", "expected one of"), ("\n", "holds no")],
)
def test_a_file_of_recbole_s_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "x.test").write_text(text)
    with pytest.raises(SettingError, match=message):
        spaces.read_space(tmp_path / "x.test")


def test_a_missing_file_is_named():
    with pytest.raises(SettingError, match=r"search space nowhere\.yaml not found"):
        spaces.read_space("nowhere.yaml")


# -- the spaces that ship --------------------------------------------------------------------------------------------

OF_RECBOLE = ("EASE", "ItemKNN", "KGAT", "KGIN", "LightGCN", "MCCLK", "NCL", "SGL", "SLIMElastic")
SHIPPED = sorted((PROPERTIES / "tune").glob("*.yaml"))


def test_spaces_ship_for_these_models():
    assert {path.stem for path in SHIPPED} == {*OF_RECBOLE, *MODELS}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_space_has_reasons_and_fits_its_model(path):
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            assert line.partition("#")[2].strip(), f"{line}: no reason"
    search = make_search(path.stem, "toy")
    defaults = search.config()
    for name, domain in search.space.items():
        if path.stem not in ("KGAT", "LightGCN", "EASE"):  # RecBole's defaults, which its own ranges leave out
            value = defaults[name]
            inside = value in domain.steps if domain.steps else domain.values[0] <= value <= domain.values[1]
            assert inside, f"{name}: the default {value} lies outside"
    assert yaml.safe_load(path.read_text()).keys() == search.space.keys()
