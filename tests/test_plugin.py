"""The package's place inside RecBole."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import QUIET
from recbole.config import Config
from recbole.utils import ModelType, get_model, get_trainer

from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config, unknown_settings
from recbole_slifmr.model import MODELS
from recbole_slifmr.model.slifmr import SLIFMR
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.plugin import register
from recbole_slifmr.training.trainer import SLIFMRTrainer


def run_python(code, *arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, **kwargs
    )


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])  # RecBole's Config reads them


def test_recbole_finds_model_trainer_and_data_set_by_name(tiny):
    assert get_model("SLIFMR") is SLIFMR
    assert get_trainer(ModelType.GENERAL, "SLIFMR") is SLIFMRTrainer
    import recbole.data.dataset

    for name in ("SLIFMR", "LightGCN", "KGAT", "BPR"):
        assert getattr(recbole.data.dataset, f"{name}Dataset") is SLIFMRDataset
    assert not hasattr(recbole.data.dataset, "SASRecDataset"), "sequential models keep RecBole's own"
    config = Config("SLIFMR", "tiny", config_dict={**QUIET, "data_path": str(tiny.parent)})
    assert config["refresh_k"] == yaml.safe_load((PROPERTIES / "model" / "SLIFMR.yaml").read_text())["refresh_k"]


def test_registering_twice_changes_nothing():
    before = Config._update_internal_config_dict
    register()
    assert Config._update_internal_config_dict is before


@pytest.mark.parametrize("own, expected", [(None, "passive"), ("active", "active")])
def test_threads_leave_the_cores_to_others_while_they_wait_unless_told_otherwise(own, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, recbole_slifmr; print(os.environ['OMP_WAIT_POLICY'])"
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    assert run_python(code, env=environment).stdout.strip() == expected


def test_run_recbole_from_python(tiny):
    from recbole.quick_start import run_recbole

    result = run_recbole("SLIFMR", "tiny", config_dict={**QUIET, "data_path": str(tiny.parent)})
    assert 0 <= result["test_result"]["recall@10"] <= 1


def test_yaml_layers(tmp_path):
    """RecBole's own YAML, then this package's at the same place, then the user's."""
    config = make_config("SLIFMR", "toy")
    assert config["benchmark_filename"] == ["train", "valid", "test"], "properties/dataset"
    assert config["topk"] == [10, 20], "properties/overall.yaml"
    assert config["learner"] == "adam", "RecBole's overall.yaml"
    file = tmp_path / "mine.yaml"
    file.write_text("topk: [5]\nrefresh_k: 3\nvalid_metric: Recall@5\n")
    config = make_config("SLIFMR", "toy", [file], {"refresh_k": 4})
    assert config["topk"] == [5] and config["refresh_k"] == 4


def test_recbole_s_model_yaml_wins_over_ours_for_its_models():
    assert make_config("LightGCN", "toy")["reg_weight"] == pytest.approx(1e-5)
    assert make_config("LightGCN", "toy")["intra_weight"] is None


SETTINGS_FILES = [path for path in sorted(PROPERTIES.rglob("*.yaml")) if path.parent.name not in ("tune", "study")]


@pytest.mark.parametrize("path", SETTINGS_FILES, ids=lambda p: str(p.relative_to(PROPERTIES)))
def test_every_yaml_says_what_each_setting_is_and_is_known(path):
    settings = yaml.safe_load(path.read_text())
    assert settings
    if path.parent.name == "model":
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert "# (" in line, f"{line}: no type and meaning"
    of_a_model = path.parent.name == "model" or path.parent.parent.name == "dataset"
    model = path.stem if of_a_model else "SLIFMR"
    assert unknown_settings(make_config(model, "toy", [path])) == []


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_of_a_model_has_a_yaml_entry(model):
    import inspect

    from recbole_slifmr.host.settings import _look_ups

    settings = yaml.safe_load((PROPERTIES / "model" / f"{model}.yaml").read_text())
    read = _look_ups(inspect.getsource(inspect.getmodule(get_model(model))))
    assert read <= set(settings) | {"device", "train_neg_sample_args"}
    assert get_model(model).__doc__ and "arXiv" in inspect.getmodule(get_model(model)).__doc__, "cites its source"


# -- settings that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        ({"intra_weight": "abc"}, "intra_weight must be a number, not 'abc'"),
        ({"use_kg": "maybe"}, "use_kg must be True or False, not 'maybe'"),
        ({"n_layers": True}, "n_layers must be a whole number, not True"),
        ({"intra_views": "kg"}, "intra_views must be a list, not 'kg'"),
        ({"seed": "abc"}, "seed must be a whole number"),
        ({"topk": [5], "valid_metric": "Recall@30"}, "valid_metric: 'Recall@30' is not among"),
        ({"metrics": ["NDCG"], "valid_metric": "Recall@10"}, "valid_metric: 'Recall@10' is not among"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_are_named(tiny, settings, message):
    with pytest.raises(SettingError, match=message):
        Config("SLIFMR", "tiny", config_dict={**QUIET, "data_path": str(tiny.parent), **settings})


def test_a_whole_number_will_do_for_a_number(tiny):
    assert make_config("SLIFMR", "toy", settings={"intra_weight": 0, "eta_kg": 1})["eta_kg"] == 1


def test_the_validation_metric_follows_topk(tiny):
    assert make_config("LightGCN", "toy", settings={"topk": [10]})["valid_metric"] == "Recall@10"
    assert make_config("LightGCN", "toy", settings={"topk": 5})["valid_metric"] == "Recall@5"
    assert make_config("LightGCN", "toy", settings={"topk": [5, 20, 50]})["valid_metric"] == "Recall@20"
    assert make_config("LightGCN", "toy")["valid_metric"] == "Recall@20"


def test_paths_and_numpy_numbers_become_plain(tiny):
    import numpy as np

    config = make_config("SLIFMR", "tiny", settings={"data_path": tiny.parent, "refresh_interval": np.int64(2)})
    assert config["data_path"] == str(tiny) and type(config["refresh_interval"]) is int


def test_models_that_score_pairs_get_smaller_batches():
    assert make_config("LightGCN", "toy")["eval_batch_size"] > make_config("NeuMF", "toy")["eval_batch_size"]
    mode = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "uni10"}}
    assert make_config("LightGCN", "toy", settings=mode)["eval_batch_size"] == 65_536
    assert make_config("NeuMF", "toy", settings={"eval_batch_size": 7})["eval_batch_size"] == 7


# -- unknown settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"knn_kk": 5}, "unknown setting 'knn_kk': neither RecBole nor SLIFMR reads it; did you mean 'knn_k'?"),
        ({"epoch": 5}, "unknown setting 'epoch': .*; did you mean 'epochs'?"),
        ({"zzzzzzzz": 5}, "unknown setting 'zzzzzzzz': neither RecBole nor SLIFMR reads it$"),
        ({"mlp_hidden_size": [8]}, "unknown setting 'mlp_hidden_size'"),
    ],
    ids=str,
)
def test_an_unknown_setting_is_warned_of_with_the_nearest_name(tiny, settings, message):
    with pytest.warns(UnknownSettingWarning, match=message):
        Config("SLIFMR", "tiny", config_dict={**QUIET, "data_path": str(tiny.parent), **settings})


@pytest.mark.parametrize(
    "settings",
    [{"checkpoint_dir": "x"}, {"encoding": "utf-8"}, {"worker": 0}, {"kg_reverse_r": True}, {"callbacks": []}],
    ids=str,
)
def test_settings_that_recbole_or_the_model_reads_are_known(tiny, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownSettingWarning)
        Config("SLIFMR", "tiny", config_dict={**QUIET, "data_path": str(tiny.parent), **settings})


def test_settings_of_this_package_s_trainer_mean_nothing_to_recbole_s_models():
    assert unknown_settings(make_config("SLIFMR", "toy", settings={"self_loop": False})) == []
    with pytest.warns(UnknownSettingWarning, match="'self_loop': neither RecBole nor LightGCN reads it"):
        make_config("LightGCN", "toy", settings={"self_loop": False})


def test_another_model_s_setting_is_known_to_that_model(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownSettingWarning)
        Config("NeuMF", "tiny", config_dict={**QUIET, "mlp_hidden_size": [8], "data_path": str(tiny.parent)})


# -- other processes -------------------------------------------------------------------------------------------------

SPAWN = """
import sys
folder = sys.argv[1]
sys.argv = sys.argv[:1]
import multiprocessing
import recbole_slifmr
from recbole.quick_start import run_recbole
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        settings = dict(data_path=folder, epochs=1, show_progress=False, topk=[5], valid_metric="Recall@5")
        result = pool.apply(run_recbole, ("SLIFMR", "tiny"), dict(config_dict=settings))
    print("recall", result["test_result"]["recall@5"])
"""


def test_a_spawned_process_knows_the_plugin(tiny, tmp_path):
    """Pickled from ``python -c``, so that the new process imports nothing but what the pickle names."""
    done = run_python(SPAWN, tiny.parent, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recall 0." in done.stdout


def test_entry_points_are_ours_whether_quick_start_is_imported_before_or_after():
    for order in (
        "import recbole_slifmr; import recbole.quick_start as q",
        "import recbole.quick_start as q; import recbole_slifmr",
    ):
        done = run_python(
            "import sys; " + order + "; import recbole.quick_start.quick_start as m; "
            "print(q.run_recbole.__module__, m.run_recbole.__module__, m.run_recboles.__module__)"
        )
        assert done.stdout.split() == ["recbole_slifmr.plugin"] * 3, done.stderr


def test_importing_leaves_ray_alone():
    done = run_python("import sys, recbole_slifmr; print('ray' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_without_recbole_the_import_says_how_to_install_it(tmp_path):
    (tmp_path / "recbole.py").write_text("raise ImportError('no recbole here')")
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import recbole_slifmr")
    assert done.returncode != 0
    assert "pip install --no-deps recbole==1.2.1" in done.stderr.splitlines()[-1]


# -- structure -------------------------------------------------------------------------------------------------------

ROOMS = [  # a room imports from itself and from those before it
    {"errors", "files", "paths", "moved"},
    {"nn"},
    {"data"},
    {"model"},
    {"host"},
    {"training"},
    {"plugin", "doctor", "study", "serve"},
    {"search"},
    {"cli"},
]
PURE = ("nn", "errors", "files", "paths")


def _imports(package):
    """Return, by module of the package, the modules that it imports, within functions too."""
    import ast

    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else node.module for name in full}
        found[module] = names
    return found


def test_ray_is_imported_where_many_runs_are_run_and_nowhere_else():
    imports = _imports(Path(sys.modules["recbole_slifmr"].__file__).parent)
    users = {module for module, names in imports.items() if any(name.split(".")[0] == "ray" for name in names)}
    assert users == {"recbole_slifmr.study.runs", "recbole_slifmr.search.tune"}


def test_imports_point_one_way():
    imports = _imports(Path(sys.modules["recbole_slifmr"].__file__).parent)
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    for module, names in imports.items():
        own = [*module.split("."), ""][1]
        for name in names if own else ():
            assert own not in PURE or not name.startswith("recbole."), f"{module} imports {name}: it is pure"
            if name.startswith("recbole_slifmr."):
                assert level[name.split(".")[1]] <= level[own], f"{module} imports {name}"


def test_no_module_imports_itself_through_others():
    from graphlib import TopologicalSorter

    imports = _imports(Path(sys.modules["recbole_slifmr"].__file__).parent)
    TopologicalSorter({module: names - {"recbole_slifmr"} for module, names in imports.items()}).prepare()


@pytest.mark.parametrize("old, new", [("callback", "training"), ("benchmark", "study"), ("tune", "search")])
def test_an_old_import_path_gives_the_moved_module_and_warns(old, new):
    done = run_python(
        "import sys, warnings; warnings.simplefilter('ignore'); import recbole_slifmr, importlib\n"
        "warnings.simplefilter('error', DeprecationWarning)\n"
        f"try: import recbole_slifmr.{old}\n"
        "except DeprecationWarning as w: print(w)\n"
        "warnings.simplefilter('ignore')\n"
        f"import recbole_slifmr.{old} as old, recbole_slifmr.{new}.{old} as new; print(old is new)"
    )
    path = f"recbole_slifmr.{old}"
    assert done.stdout.splitlines() == [f"{path} has moved to recbole_slifmr.{new}.{old}", "True"], done.stderr
