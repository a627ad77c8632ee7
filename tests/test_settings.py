"""The settings of the models: declared, explained, checked and searched without contradiction."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from recbole.utils import get_model

import recbole_slifmr
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import MODELS
from recbole_slifmr.model.settings import ModelSettings, Positive, Range, check, split_type
from recbole_slifmr.model.xsimgcl import XSimGCLSettings
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.search.space import read_space

RANGE = re.compile(r"[;)] ([\d.e-]+)(?: to |, (?:[\d.e-]+, )*)([\d.e-]+)[.;]")


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


def read_yaml(model_name):
    """Return the line of each setting in a model's YAML, by name."""
    lines = (PROPERTIES / "model" / f"{model_name}.yaml").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: line for line in lines if line and not line.startswith("#")}


def test_yaml_and_declarations_tell_the_same(model_name):
    settings = get_model(model_name).settings_class
    declared, lines = get_type_hints(settings, include_extras=True), read_yaml(model_name)
    assert set(declared) == set(lines)
    values = yaml.safe_load((PROPERTIES / "model" / f"{model_name}.yaml").read_text(encoding="utf-8"))
    for name, line in lines.items():
        explained = re.fullmatch(r"\w+: .+ +# \((\w+(?: or \w+)*)\) (.+\.)", line)
        assert explained, line
        kinds, limits = split_type(declared[name])
        assert explained[1].split(" or ") == [kind.__name__ for kind in kinds if kind is not type(None)], line
        for limit in limits:
            if isinstance(limit, Range):
                ends = RANGE.search(line)
                assert all(float(end) in limit for end in (ends.groups() if ends else ())), f"{line}: not {limit}"
            else:
                assert all(word in explained[2] for word in limit), f"{line}: one of {limit}"
        assert getattr(settings, name, values[name]) == values[name], f"{name}: two defaults"


def test_the_ranges_in_the_yaml_are_those_that_a_search_tries(model_name):
    lines = read_yaml(model_name)
    declared = get_type_hints(get_model(model_name).settings_class, include_extras=True)
    space = read_space(PROPERTIES / "tune" / f"{model_name}.yaml")
    negatives = space.pop("train_neg_sample_args", None)  # RecBole's setting, not the model's
    if negatives:
        shipped = make_config(model_name, "shop-demo")["train_neg_sample_args"]
        assert all(set(choice) == set(shipped) for choice in negatives.ends)
    for name, domain in space.items():
        for end in domain.ends:
            check(name, end, declared[name])
        if not any(isinstance(end, bool) for end in domain.ends):
            found = RANGE.search(lines[name])
            assert found and [float(end) for end in found.groups()] == [min(domain.ends), max(domain.ends)], lines[name]


def test_every_setting_of_a_model_is_used(model_name):
    root = Path(recbole_slifmr.__file__).parent
    sources = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    used = {name for pair in re.findall(r'settings\.(\w+)|"(\w+)"', sources) for name in pair}
    assert set(get_type_hints(get_model(model_name).settings_class)) <= used


@pytest.mark.parametrize(
    "value, annotation, message",
    [
        (1, Positive, None),
        (0, Positive, "x must be above 0, not 0"),
        (float("nan"), Positive, "x must be above 0, not nan"),
        ("1", Positive, "x must be a number, not '1'"),
        (True, int, "x must be a whole number, not True"),
        (1.0, int, "x must be a whole number, not 1.0"),
        (None, str | None, None),
        (None, str, "x must be a word, not None"),
        (3, dict | str, "x must be a dict or a word, not 3"),
        ([], list, None),
    ],
)
def test_a_value_is_checked_against_its_declaration(value, annotation, message):
    if message is None:
        check("x", value, annotation)
    else:
        with pytest.raises(SettingError, match=f"^{message}$"):
            check("x", value, annotation)


def test_ranges_include_their_ends_or_not():
    assert [value in Range(0, 1, "[)") for value in (-0.1, 0, 0.5, 1)] == [False, True, True, False]
    assert [value in Range(0, 1, "(]") for value in (0, 1)] == [False, True]
    assert [str(r) for r in (Range(0, 1), Range(1), Range(0, ends="(]"))] == ["in [0, 1]", "1 or more", "above 0"]


def test_a_setting_out_of_range_is_refused_before_data_are_read():
    with pytest.raises(SettingError, match=r"^knn_k must be 1 or more, not 0$"):
        make_config("LATTICE", "toy", settings={"knn_k": 0})


def test_settings_that_a_checkpoint_from_before_lacks_have_their_default():
    stored = dict(make_config("XSimGCL", "toy").final_config_dict)
    del stored["n_negatives"]
    assert XSimGCLSettings.read({"n_negatives": None, **stored}).n_negatives == 4096


def test_a_setting_without_default_is_needed():
    stored = {**make_config("XSimGCL", "toy").final_config_dict, "embedding_size": None}
    with pytest.raises(SettingError, match="embedding_size has no value: set it; a checkpoint of an earlier"):
        ModelSettings.read(stored)
