"""Models of the user's own, named ``module:Class``, in every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import recbole.data.dataset
import recbole.trainer
import torch
import yaml
from conftest import write_tiny
from finished import plan_of
from recbole.utils import get_model

from recbole_slifmr import Recommender
from recbole_slifmr.cli import run_script
from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host import own
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.search.plan import make_search
from recbole_slifmr.serve.trained import load_trained
from recbole_slifmr.study.benchmark import benchmark
from recbole_slifmr.study.plan import make_study
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import run
from recbole_slifmr.training.trainer import ClosedFormTrainer, SLIFMRTrainer

ROOT = Path(__file__).parents[1]
FAST = ["--epochs=1", "--topk=[5]", "--valid_metric=Recall@5", "--show_progress=False", "--data_path=."]
MODEL = '''
import torch
from recbole.model.general_recommender import BPR


class {name}(BPR):
    """BPR with scores times a setting; it writes a file when its module is imported."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.factor = config["factor"]

    def full_sort_predict(self, interaction):
        return self.factor * super().full_sort_predict(interaction)
'''


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    """Return a function that makes this process as one that has not heard of own models; also run at the end."""
    packages = (recbole.data.dataset, recbole.trainer)
    before = [set(vars(package)) for package in packages]
    monkeypatch.setattr(own, "_used", {})
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget_models():
        own._used.clear()
        for package, names in zip(packages, before, strict=True):
            for name in set(vars(package)) - names:
                delattr(package, name)
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]

    yield forget_models
    forget_models()


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with the tiny data set and a model ``Mine`` whose YAML has a setting."""
    write_tiny(tmp_path)
    (tmp_path / "ownmodels.py").write_text(MODEL.format(name="Mine"))
    (tmp_path / "Mine.yaml").write_text("embedding_size: 8\nfactor: 2.0  # (float) of the scores\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments, cwd):
    """Run ``slifmr`` as its script does: the working directory is not in Python's path."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from recbole_slifmr.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


# -- what RecBole is told ---------------------------------------------------------------------------------------------


def test_recbole_knows_it_by_the_name_of_its_class_and_its_settings_lie_beside_it(work):
    config = make_config("ownmodels:Mine", "tiny", settings={"data_path": "."})
    assert config["model"] == "Mine" and config["own_model"] == "ownmodels:Mine"
    assert (config["factor"], config["embedding_size"]) == (2.0, 8)
    assert get_model("Mine") is config.model_class and config.model_class.__module__ == "ownmodels"
    assert make_config("ownmodels:Mine", "tiny", settings={"factor": 3.0})["factor"] == 3.0


def test_it_has_the_settings_of_what_it_derives_from(work):
    (work / "derived.py").write_text(
        "from recbole.model.general_recommender import BPR\nfrom recbole_slifmr.model.slifmr import SLIFMR\n"
        "class OfBPR(BPR): pass\nclass OfSLIFMR(SLIFMR): pass\n"
    )
    assert make_config("derived:OfBPR", "tiny")["embedding_size"] == 64
    (work / "OfSLIFMR.yaml").write_text("n_layers: 1\n")
    config, plain = make_config("derived:OfSLIFMR", "tiny"), make_config("SLIFMR", "tiny")
    assert config["n_layers"] == 1 and config["linear_scale"] == plain["linear_scale"]


def test_its_class_alone_names_it_once_it_is_known(work):
    make_config("ownmodels:Mine", "tiny")
    assert make_config("Mine", "tiny")["own_model"] == "ownmodels:Mine"


def test_a_file_beside_it_that_is_no_python_counts_in_its_code(work):
    (work / "helper").mkdir()
    (work / "helper" / "broken.py").write_text("def (")
    (work / "ownmodels.py").write_bytes(b"\xef\xbb\xbf" + b"import helper\n" + MODEL.format(name="Mine").encode())
    make_config("ownmodels:Mine", "tiny")
    assert work / "helper" / "broken.py" in own.sources_of("Mine")


def test_it_has_the_trainer_and_the_data_set_class_of_what_it_derives_from(work):
    (work / "several.py").write_text(
        "from recbole.model.abstract_recommender import GeneralRecommender\n"
        "from recbole.model.knowledge_aware_recommender import KGAT\n"
        "from recbole.model.sequential_recommender import SASRec\n"
        "from recbole_slifmr.model.base import EmbeddingRecommender\n"
        "from recbole_slifmr.model.cease import CEASE\n"
        + "".join(
            f"class Of{base}({base}): pass\n"
            for base in ("GeneralRecommender", "KGAT", "SASRec", "EmbeddingRecommender", "CEASE")
        )
    )
    for name in ("OfGeneralRecommender", "OfKGAT", "OfSASRec", "OfEmbeddingRecommender", "OfCEASE"):
        assert own.use(f"several:{name}") == name
    data, trainers = vars(recbole.data.dataset), vars(recbole.trainer)
    assert all(data[f"Of{base}Dataset"] is SLIFMRDataset for base in ("GeneralRecommender", "KGAT", "CEASE"))
    assert "OfSASRecDataset" not in data and "OfGeneralRecommenderTrainer" not in trainers
    assert trainers["OfKGATTrainer"] is recbole.trainer.KGATTrainer
    assert trainers["OfEmbeddingRecommenderTrainer"] is SLIFMRTrainer
    assert trainers["OfCEASETrainer"] is ClosedFormTrainer


BAD = {
    "no module": ("nowhere:Mine", "there is no module nowhere, neither in"),
    "no module in a package": ("package.nowhere:Mine", "there is no module package.nowhere, neither in"),
    "no class": ("ownmodels:Yours", "module ownmodels has no class 'Yours'; its models: Mine"),
    "no model": ("package:Plain", "Plain is no model of RecBole's: derive it from GeneralRecommender"),
    "no type": ("package:Abstract", "Abstract is no model of RecBole's: derive it from GeneralRecommender"),
    "no name": ("ownmodels:", "a model of your own is named module:Class"),
    "a path": ("./ownmodels.py:Mine", "a model of your own is named module:Class"),
    "in a notebook": ("__main__:Mine", "lies in a module that can be imported"),
    "a name of this package": ("package:SLIFMR", "there is another model called SLIFMR"),
    "a name of RecBole": ("package:BPR", "there is another model called BPR"),
    "a name of RecBole in other letters": ("package:bPr", "there is another model called bPr"),
    "a name of a trainer": ("package:Traditional", "there is another model called Traditional"),
    "an error in it": ("broken:Mine", "broken cannot be imported: NameError: name 'torhc' is not defined"),
    "a word of Python": ("wrong:Mine", "wrong cannot be imported: SyntaxError"),
    "a missing import": ("lacking:Mine", "lacking cannot be imported: ModuleNotFoundError: No module named 'nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_line_and_status_2(work, case, capsys):
    model, message = BAD[case]
    (work / "broken.py").write_text("torhc.nn\n")
    (work / "wrong.py").write_text("class\n")
    (work / "lacking.py").write_text("import nothing\n")
    (work / "package").mkdir()
    (work / "package" / "__init__.py").write_text(
        "from recbole.model.abstract_recommender import AbstractRecommender, GeneralRecommender\n"
        "class Plain: pass\nclass Abstract(AbstractRecommender): pass\n"
        + "".join(f"class {name}(GeneralRecommender): pass\n" for name in ("SLIFMR", "BPR", "bPr", "Traditional"))
    )
    for words in (["train", f"--model={model}"], ["benchmark", f"--models=Pop,{model}"]):
        with pytest.raises(SystemExit) as stop:
            run_script([*words, "--dataset=tiny", *FAST])
        assert stop.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and "Traceback" not in "".join(said)


def test_two_models_of_one_name_are_refused(work):
    (work / "others.py").write_text(MODEL.format(name="Mine"))
    own.use("ownmodels:Mine")
    assert own.use("ownmodels:Mine") == "Mine", "again"
    with pytest.raises(SettingError, match="'others:Mine': there is another model called ownmodels:Mine"):
        own.use("others:Mine")
    with pytest.raises(SettingError, match="a model is named twice"):
        plan_of(work, ["ownmodels:Mine", "others:Mine"])


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_recommend_and_resume_from_the_shell(work):
    """In processes of their own, that know the model from its name on the command line alone."""
    named = ["--model=ownmodels:Mine", "--dataset=tiny", *FAST]
    done = command("train", *named, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "Mine on tiny: 20 users" in done.stdout
    (checkpoint,) = (work / "saved").glob("Mine-*.pth")
    state = read_checkpoint(checkpoint)
    assert state["config"]["own_model"] == "ownmodels:Mine" and state["config"]["factor"] == 2.0
    assert "ownmodels" not in sys.modules, "reading it imports nothing"
    shown = command("recommend", f"--checkpoint={checkpoint}", named[0], "--users=u1", "--k=3", cwd=work)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 4, shown.stderr
    longer = [*named[:2], "--epochs=2", *FAST[1:]]
    resumed = command("train", *longer, f"--resume={checkpoint}", cwd=work)
    assert resumed.returncode == 0 and "1 epochs" in resumed.stdout, resumed.stderr


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_benchmark_has_a_row_of_it(work, jobs):
    """With one job in processes started one after another, with two in Ray's."""
    settings = {"epochs": 1, "data_path": ".", "train_batch_size": 64, "topk": [5], "valid_metric": "Recall@5"}
    runs = benchmark("tiny", ["BPR", "ownmodels:Mine"], jobs, out="out", seeds=1, settings=settings)
    assert list(runs["model"]) == ["BPR", "Mine"]
    bpr, mine = runs.set_index("model").loc[["BPR", "Mine"], "n_parameters"]
    assert mine * 8 == bpr, "its YAML says embedding_size 8, RecBole 64"
    assert "| Mine |" in (work / "out" / "table.md").read_text()
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["settings"]["Mine"]["own_model"] == "ownmodels:Mine"


@pytest.mark.slow
def test_a_search_tries_it(work):
    (work / "space.yaml").write_text("factor: {choice: [1.0, 2.0]}\n")
    done = command(
        "tune", "--model=ownmodels:Mine", "--dataset=tiny", "--space=space.yaml", "--trials=1", "--jobs=1", "--seeds=1",
        "--train_batch_size=64", *FAST, cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = pd.read_csv(work / "tune" / "trials.csv")
    assert trials["status"].tolist() == ["finished"], trials["error"].tolist()
    assert len(pd.read_csv(work / "tune" / "test.csv")) == 1
    best = yaml.safe_load((work / "tune" / "best.yaml").read_text())
    assert best["model"] == "ownmodels:Mine", "what slifmr train --config_files=tune/best.yaml trains"


def test_a_search_without_a_space_says_that_it_needs_one(work):
    with pytest.raises(SettingError, match=r"no search space for ownmodels:Mine .* name a file with --space"):
        make_search("ownmodels:Mine", "tiny", settings={"data_path": "."})


def test_a_study_calls_it_by_its_class(work):
    changes = {"models": ["BPR", "ownmodels:Mine"], "kinds": ["interaction"], "levels": [0, 0.5]}
    study = make_study("robustness", "tiny", changes, seeds=1, settings={"data_path": "."})
    assert [task.title for task in study.tasks if task.model != "BPR"] == [
        "Mine interaction_add=0",
        "Mine interaction_add=0.5",
    ]
    assert {factors["model"] for factors in study.factors.values()} == {"BPR", "Mine"}


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(work):
    settings = {"epochs": 1, "topk": [5], "valid_metric": "Recall@5", "data_path": ".", "show_progress": False}
    return run("ownmodels:Mine", "tiny", settings=settings, log=False).checkpoint


def test_a_checkpoint_imports_nothing_unless_the_user_names_it(work, checkpoint, forget):
    here = load_trained(checkpoint).scores
    forget()
    with pytest.raises(SettingError, match="name it with --model=ownmodels:Mine"):
        load_trained(checkpoint)
    with pytest.raises(SettingError, match="is of 'Mine', not of 'ownmodels:Yours'"):
        load_trained(checkpoint, model="ownmodels:Yours")
    assert "ownmodels" not in sys.modules
    trained = load_trained(checkpoint, model="ownmodels:Mine")
    users = trained.user_ids(["u1", "u2"])
    assert trained.scores(users).equal(here(users))
    assert trained.config["factor"] == 2.0


def test_a_model_that_has_moved_is_named_where_it_is_now(work, checkpoint, forget):
    forget()
    (work / "package").mkdir()
    (work / "ownmodels.py").rename(work / "package" / "moved.py")
    (work / "Mine.yaml").rename(work / "package" / "Mine.yaml")
    assert load_trained(checkpoint, model="package.moved:Mine").model.factor == 2.0


def test_a_name_in_a_checkpoint_that_is_no_name_is_not_repeated(work, checkpoint, forget):
    state = read_checkpoint(checkpoint)
    state["config"].final_config_dict["own_model"] = "--model=x\n__import__('os')"
    torch.save(state, checkpoint, pickle_protocol=2)
    forget()
    with pytest.raises(SettingError, match="no model of this package") as error:
        load_trained(checkpoint)
    assert "__import__" not in str(error.value)


def test_a_saved_recommender_needs_the_name_too(work, forget):
    pairs = [(user, (user + i) % 9) for user in range(12) for i in range(5)]
    frame = pd.DataFrame(pairs, columns=["user", "item"])
    recommender = Recommender("ownmodels:Mine", epochs=1, topk=[5], valid_metric="Recall@5").fit(frame)
    shown = recommender.recommend(1, k=2)
    recommender.save("kept")
    assert Recommender.load("kept").recommend(1, k=2).equals(shown), "this process knows the model"
    forget()
    with pytest.raises(SettingError, match="model='ownmodels:Mine'"):
        Recommender.load("kept")
    about = json.loads((work / "kept" / "recommender.json").read_text())
    (work / "kept" / "recommender.json").write_text(json.dumps({**about, "model": "os:Evil"}))
    loaded = Recommender.load("kept", model="ownmodels:Mine")
    assert loaded.recommend(1, k=2).equals(shown) and loaded.model == "ownmodels:Mine"


# -- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["ownmodels.py", "Mine.yaml", "part.py", "parts/deep.py"])
def test_a_run_of_other_code_of_it_is_not_taken_for_this_one(work, file):
    """The module, what it imports from beside it, and its settings."""
    (work / "part.py").write_text("import parts.deep\n")
    (work / "parts").mkdir()
    (work / "parts" / "deep.py").write_text("")
    (work / "stranger.py").write_text("")
    (work / "ownmodels.py").write_text("from part import parts\n" + MODEL.format(name="Mine"))
    task = plan_of(work, ["ownmodels:Mine"]).tasks[0]
    before = task.key()
    (work / "stranger.py").write_text("# no part of it\n")
    assert task.key() == before
    (work / file).write_text((work / file).read_text() + "# changed\n")
    assert task.key() != before


def test_of_a_package_all_code_counts(work):
    (work / "package" / "inner").mkdir(parents=True)
    (work / "package" / "other.py").write_text("")
    (work / "package" / "inner" / "models.py").write_text(MODEL.format(name="Mine"))
    task = plan_of(work, ["package.inner.models:Mine"]).tasks[0]
    before = task.key()
    (work / "package" / "other.py").write_text("# changed\n")
    assert task.key() != before
