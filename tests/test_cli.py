"""Every command as a person runs it."""

import contextlib
import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny

from recbole_slifmr.cli import main, run_script
from recbole_slifmr.errors import SettingError, StorageError
from recbole_slifmr.host.settings import make_config, parse_settings
from recbole_slifmr.paths import ROOT
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.log import end_log, start_log

FAST = ["--epochs=1", "--show_progress=False", "--topk=[5]", "--valid_metric=Recall@5"]


def command(*arguments, cwd, module=None):
    program = {
        "run_script": [str(ROOT / "run_recbole_slifmr.py")],
        "slifmr": ["-c", "from recbole_slifmr.cli import main; main()"],
        "run_recbole": ["-c", "from recbole_slifmr.cli import run_recbole; run_recbole()"],
    }[module or "run_script"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def work(tmp_path):
    write_tiny(tmp_path / "dataset")
    return tmp_path


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 0.001),
        ("['train','valid']", ["train", "valid"]),
        ("{text: text.npy, image: a=b.npy}", {"text": "text.npy", "image": "a=b.npy"}),
        ("true", True),
        ("False", False),
        ("None", None),
        ("saved/x", "saved/x"),
        ("str.npy", "str.npy"),
        ("Recall@20", "Recall@20"),
        ("2020", 2020),
        ("a: b: c", "a: b: c"),
    ],
)
def test_values_are_read(text, value):
    assert parse_settings([f"--x={text}"]) == {"x": value}
    assert parse_settings(["--x", text]) == {"x": value}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["knn_k=3"], "unexpected argument 'knn_k=3'"),
        (["--knn_k"], "'--knn_k' has no value"),
        (["--knn_k", "--epochs=1"], "'--knn_k' has no value"),
        (["--a=1", "--a=2"], "'--a' is given twice"),
    ],
)
def test_odd_arguments_are_named(arguments, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(arguments)


# -- runs ------------------------------------------------------------------------------------------------------------


TWO_EPOCHS = ("--model=SLIFMR", "--dataset=tiny", "--epochs=2", "--topk=[5,10]", "--valid_metric=Recall@10")
IN_THE_LOG = ("refresh_k = ", "modality text", "Trainable parameters", "epoch 1 refresh:", "epoch 1 training", "Saving")


def file_of(label, shown):
    """Return the file that a run names in a line such as ``log: FILE``."""
    return next(line for line in shown.splitlines() if line.startswith(f"{label}: ")).partition(": ")[2]


def test_the_script_says_in_a_few_lines_what_was_trained_how_well_and_where_it_lies(work):
    done = command(*TWO_EPOCHS, "--structure_weight=0", cwd=work)  # with it 15 items are alike, and a warning says so
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 100
    assert lines[0] == "SLIFMR on tiny: 20 users, 15 items"
    assert lines[1] == "100 training, 20 validation, 20 test interactions"
    assert lines[2] == "knowledge graph: 16 triples, 14 of 15 items linked; image: 14 of 15 items; text: 14 of 15 items"
    saved = torch.load(work / file_of("checkpoint", done.stdout), weights_only=False)
    assert saved["epoch"] in (0, 1)
    assert lines[3].startswith("SLIFMR on tiny: 2 epochs in ")
    assert lines[3].endswith(f"; best: epoch {saved['epoch']}, counted from 0")
    row = next(line for line in lines if line.startswith("Recall@5 / @10 "))
    valid = [saved["best_valid_result"][name] for name in ("recall@5", "recall@10")]
    assert " / ".join(f"{score:.4f}" for score in valid) in row and row.count(" / ") == 3
    log = (work / file_of("log", done.stdout)).read_text()
    assert all(text in log for text in IN_THE_LOG), "the file has everything"


def test_verbose_prints_the_log(work):
    done = command(*TWO_EPOCHS, "--verbose", cwd=work)
    assert done.returncode == 0, done.stderr
    for text in ("SLIFMR on tiny", "validation", "test", "Recall@5 / @10", "2 epochs"):
        assert text in done.stdout
    assert all(text in done.stderr for text in IN_THE_LOG) and "Train     0" in done.stderr
    log = (work / file_of("log", done.stdout)).read_text()
    assert all(text in log for text in IN_THE_LOG)


@pytest.mark.parametrize("more, shown", [((), True), (("--show_progress=False",), False)])
def test_on_a_terminal_one_bar_shows_the_epochs(work, more, shown):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    program = [sys.executable, str(ROOT / "run_recbole_slifmr.py"), *TWO_EPOCHS, *more]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(program, cwd=work, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # Linux's end of a terminal
            while part := os.read(ours, 65536):
                said += part
        assert process.stdout.read().count(b"Recall@5") == 1
    os.close(ours)
    assert process.returncode == 0
    assert ("epoch 2 of 2" in said.decode()) == ("best Recall@10 " in said.decode()) == shown
    assert "Train     0" not in said.decode() and "INFO" not in said.decode()


def test_warnings_about_data_are_printed(work):
    arguments = ["--model=BPR", "--dataset=tiny", "--eval_args={split: {RS: [0.8, 0, 0.2]}}", *FAST]
    done = command(*arguments, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "no interactions of 'tiny' are left for validation" in done.stderr
    assert "INFO" not in done.stderr


@pytest.mark.parametrize("model", ["LightGCN", "KGAT"])
def test_run_recbole_runs_recbole_s_models(work, model):
    done = command(f"--model={model}", "--dataset=tiny", *FAST, cwd=work, module="run_recbole")
    assert done.returncode == 0 and done.stderr == "", "KGAT's calls of deprecated functions are not shown"
    assert f"{model} on tiny" in done.stdout


def test_train_reads_config_files_and_resumes(work):
    (work / "mine.yaml").write_text("model: SLIFMR\ndataset: tiny\nrefresh_k: 3\nepochs: 1\nshow_progress: False\n")
    (work / "more.yaml").write_text("topk: [5]\nvalid_metric: Recall@5\n")
    done = command("train", "--verbose", "--config_files", "mine.yaml more.yaml", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "refresh_k = 3" in done.stderr + done.stdout
    checkpoint = next(line for line in done.stdout.splitlines() if line.startswith("checkpoint: "))[12:]
    again = command(
        "train",
        "--config-files",
        "mine.yaml more.yaml",
        "--epochs=2",
        "--verbose",
        f"--resume={checkpoint}",
        cwd=work,
        module="slifmr",
    )
    assert again.returncode == 0, again.stderr
    assert "Resume training from epoch 1" in again.stderr + again.stdout
    assert "1 epochs in" in again.stdout


def test_a_run_resumed_from_the_shell_ends_as_the_uninterrupted_one(work):
    arguments = ["train", "--model=SLIFMR", "--dataset=tiny", "--prune_ratio=0.2", "--refresh_interval=adaptive"]
    arguments += ["--topk=[5]", "--valid_metric=Recall@5", "--show_progress=False", "--learning_rate=0.001"]

    def train(*more):
        done = command(*arguments, *more, cwd=work, module="slifmr")
        assert done.returncode == 0, done.stderr
        table = [line for line in done.stdout.splitlines() if "@5" in line]
        checkpoint = next(line for line in done.stdout.splitlines() if line.startswith("checkpoint: "))[12:]
        return table, checkpoint, read_checkpoint(work / checkpoint)

    whole_table, _, whole = train("--epochs=6")
    _, checkpoint, half = train("--epochs=2")
    table, _, resumed = train("--epochs=6", f"--resume={checkpoint}")
    assert half["epoch"] < 2 <= whole["epoch"] == resumed["epoch"], "the best epoch is one that both have trained"
    assert table == whole_table
    for part in ("state_dict", "other_parameter"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
    for state in (whole, resumed):
        for _, callback in state["callbacks"]:
            for entry in callback.get("history", ()):
                entry.pop("seconds", None)
    for name in ("cur_step", "best_valid_score", "best_valid_result", "callbacks"):
        assert resumed[name] == whole[name], name
    moments = zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(one[name], two[name]) for one, two in moments for name in one)
    assert torch.equal(resumed["random_states"]["torch"], whole["random_states"]["torch"])
    assert torch.equal(resumed["random_states"]["loader"], whole["random_states"]["loader"])
    assert resumed["data"] == whole["data"]


def test_resuming_from_another_model_is_refused(work, monkeypatch, capsys):
    """LightGCN and BPR have parameters of the same names and sizes."""
    monkeypatch.chdir(work)
    from recbole_slifmr.training.experiment import run

    settings = {"epochs": 1, "topk": [5], "show_progress": False, "state": "ERROR"}
    checkpoint = run("BPR", "tiny", settings=settings).checkpoint
    with pytest.raises(SettingError, match="is no checkpoint of LightGCN, but of BPR"):
        run("LightGCN", "tiny", settings={**settings, "epochs": 2}, resume=checkpoint)


def test_resuming_a_finished_run_is_refused(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    from recbole_slifmr.training.experiment import run

    settings = {"epochs": 1, "topk": [5], "show_progress": False, "state": "ERROR"}
    checkpoint = run("SLIFMR", "tiny", settings=settings).checkpoint
    before = checkpoint.read_bytes()
    with pytest.raises(SettingError, match="has its 1 epochs: set epochs to more to go on"):
        run("SLIFMR", "tiny", settings=settings, resume=checkpoint)
    assert checkpoint.read_bytes() == before
    assert list(work.rglob("*.pth")) == [checkpoint.resolve()], "no copy stays behind"


@pytest.mark.parametrize("split", [{"LS": "valid_only"}, {"RS": [0.8, 0, 0.2]}], ids=str)
def test_a_split_without_validation_or_test_still_ends_in_a_table(work, monkeypatch, capsys, split):
    monkeypatch.chdir(work)
    eval_args = {"split": split, "order": "RO", "group_by": "user", "mode": "full"}
    with pytest.raises(SystemExit) as stop:
        run_script(["--dataset=tiny", f"--eval_args={eval_args}", "--state=ERROR", *FAST])
    assert stop.value.code == 0
    assert "Recall@5" in capsys.readouterr().out


def test_a_run_keeps_the_log_handlers_of_its_caller(work, monkeypatch):
    from recbole_slifmr.training.experiment import run

    monkeypatch.chdir(work)
    mine = logging.StreamHandler()
    logging.getLogger().addHandler(mine)
    try:
        for _ in range(2):
            result = run("BPR", "tiny", settings={"epochs": 1, "topk": [5], "show_progress": False, "state": "ERROR"})
            assert mine in logging.getLogger().handlers
            assert result.log_file.is_file()
    finally:
        logging.getLogger().removeHandler(mine)


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "full")


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(work, monkeypatch):
    monkeypatch.chdir(work)
    config = make_config("BPR", "tiny", settings={"topk": [5]})
    file = start_log(config)
    try:
        handler = next(h for h in logging.getLogger().handlers if getattr(h, "baseFilename", "") == str(file))
        handler.stream.close()
        handler.stream = Full()
        with pytest.raises(StorageError, match=f"the log {file} cannot be written: full"):
            logging.getLogger().info("a line")
    finally:
        end_log()


def test_toy_is_found_without_a_data_path(tmp_path):
    done = command("train", "--dataset", "toy", "--model", "BPR", *FAST, cwd=tmp_path, module="slifmr")
    assert done.returncode == 0, done.stderr
    assert "BPR on toy" in done.stdout


def test_help_and_version(tmp_path):
    assert "train" in command("--help", cwd=tmp_path, module="slifmr").stdout
    assert "--resume" in command("train", "--help", cwd=tmp_path, module="slifmr").stdout
    assert "--nproc" in command("--help", cwd=tmp_path).stdout
    assert "slifmr, version" in command("--version", cwd=tmp_path, module="slifmr").stdout


# -- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "unknown setting": (["--knn_kk=5"], "unknown setting 'knn_kk'"),
    "unknown model": (
        ["--model=SLIFMRR"],
        "unknown model 'SLIFMRR': neither RecBole nor this package has it; did you mean 'SLIFMR'?",
    ),
    "unknown data set": (["--dataset=nothere"], "data set 'nothere' not found"),
    "bad choice": (["--fusion=max"], "fusion must be one of attention, sum, concat"),
    "bad metric": (["--metrics=Recal"], "There is no metric named 'Recal'"),
    "bad type": (["--topk=five"], "topk"),
    "large topk": (["--topk=[50]", "--valid_metric=Recall@50"], "topk: 50 is more than the 15 items of 'tiny'"),
    "config file of words": (["--config_files=words.yaml"], "config file words.yaml holds no settings"),
    "config file that is no YAML": (["--config_files=bad.yaml"], "config file bad.yaml is not YAML"),
    "checkpoint that is none": (["--resume=words.yaml"], "words.yaml cannot be read as a checkpoint"),
    "resume on several machines": (["--resume=x.pth", "--nproc=2"], "--resume works in a single process"),
    "negative layers": (["--kg_n_layers=-1"], "kg_n_layers must be 0 or more, not -1"),
    "wrong type": (["--stopping_step=abc"], "stopping_step must be a whole number, not 'abc'"),
    "no negatives": (["--train_neg_sample_args=None"], "train_neg_sample_args: the model learns from sampled"),
    "missing config file": (["--config_files=no.yaml"], "config file no.yaml not found"),
    "missing checkpoint": (["--resume=no.pth"], "checkpoint no.pth not found"),
    "missing feature file": (["--modalities={text: no.npy}"], "no.npy not found"),
    "stray word": (["tiny2"], "tiny2"),
    "no process": (["--nproc=0"], "--nproc=0"),
    "several machines without an address": (["--nproc=2", "--world_size=4"], "needs --ip and --port"),
    "several processes for a model without gradients": (
        ["--model=ItemKNN", "--nproc=2"],
        "ItemKNN is not trained by gradients",
    ),
    "several processes that write one file": (["--save_dataset=True", "--nproc=2"], "save_dataset: RecBole reads"),
    "no epochs": (["--epochs=0"], "epochs must be 1 or more, not 0"),
    "no batch": (["--train_batch_size=-1"], "train_batch_size must be 1 or more, not -1"),
    "no evaluation batch": (["--eval_batch_size=0"], "eval_batch_size must be 1 or more, not 0"),
    "no name of a data set": (["--dataset="], "dataset: '' is no name of a data set"),
    "a path as a data set": (["--dataset=/"], "dataset: '/' is no name of a data set"),
    "no name of a model": (["--model="], "unknown model ''"),
    "a number as a metric": (["--valid_metric=5"], "valid_metric must be a word, not 5"),
    "no metric": (["--valid_metric=None"], "valid_metric must be a word, not None"),
    "a number as the learner": (["--learner=5"], "learner must be a word, not 5"),
    "digits below none": (["--loss_decimal_place=-1"], "loss_decimal_place must be 0 or more, not -1"),
    "clipping by a number": (["--model=LightGCN", "--clip_grad_norm=5"], "clip_grad_norm must be a dict, not 5"),
    "clipping without a norm": (
        ["--model=LightGCN", "--clip_grad_norm={max: 5}"],
        "clip_grad_norm: missing a required argument: 'max_norm': write it as {max_norm: 5}",
    ),
    "RecBole's: a negative size": (["--model=LightGCN", "--embedding_size=-3"], "negative dimension -3"),
    "RecBole's: a word as a size": (["--model=LightGCN", "--embedding_size=abc"], "embedding_size must be a whole"),
    "RecBole's: no layers": (["--model=LightGCN", "--n_layers=None"], "n_layers must be a whole number, not None"),
    "RecBole's: a word as a weight": (["--model=LightGCN", "--reg_weight=abc"], "reg_weight must be a number"),
    "RecBole's: a list as a size": (["--model=NeuMF", "--mlp_hidden_size=5"], "TypeError: "),
    "RecBole's: no negatives": (["--model=BPR", "--train_neg_sample_args=None"], "BPR learns from sampled negative"),
    "RecBole's: no labels": (["--model=FM", "--valid_metric=AUC", "--metrics=[AUC]"], "FM learns from labels"),
    "several processes and a bad setting": (["--nproc=2", "--epochs=abc"], "epochs must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(work, case, monkeypatch, capsys):
    arguments, message = BAD[case]
    defaults = [a for a in ("--model=SLIFMR", "--dataset=tiny") if not any(b.startswith(a[:5]) for b in arguments)]
    defaults += [a for a in ("--topk=[5]", "--valid_metric=Recall@5") if not any(b[:6] == a[:6] for b in arguments)]
    monkeypatch.chdir(work)
    (work / "words.yaml").write_text("just words\n")
    (work / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(SystemExit) as stop:
        run_script([*defaults, "--state=ERROR", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not list(work.rglob("*.pth")), "nothing is saved"


PLACES = {
    "a file in place of the folder": (["convert", "csv", "--interactions=pairs.csv", "--out=words.yaml"], "words.yaml"),
    "a name that is too long": (["convert", "csv", "--interactions=pairs.csv", f"--name={'x' * 300}"], "too long"),
    "no folder for checkpoints": (["train", "--model=BPR", "--checkpoint_dir=words.yaml"], "words.yaml"),
    "no folder for the log": (["train", "--model=BPR"], "log"),
    "no folder for a survey": (["inspect", "tiny", "--out=words.yaml", *FAST[2:]], "words.yaml"),
    "no folder for runs": (["benchmark", "--models=BPR", "--seeds=1", "--out=words.yaml"], "words.yaml"),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_cannot_be_written_is_one_line_and_status_1(work, case, monkeypatch, capsys):
    arguments, where = PLACES[case]
    monkeypatch.chdir(work)
    (work / "words.yaml").write_text("just words\n")
    (work / "pairs.csv").write_text("user_id,item_id,rating,timestamp\nu,i,1,2\n")
    (work / "log").touch()  # a file, so that no log can be kept
    if case != "no folder for the log":
        (work / "log").unlink()
    if arguments[0] in ("train", "benchmark"):
        arguments = [*arguments, "--dataset=tiny", *FAST]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and said[-1].startswith("error: ") and where in said[-1]
    assert "cannot be written or read: " in said[-1] and "Traceback" not in "".join(said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_status_1(tmp_path):
    program = [sys.executable, "-c", "from recbole_slifmr.cli import main; main()", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: a file or the output cannot be written or read: No space left on device; check the path, its rights "
        "and the room on its disk"
    ]


def test_bad_input_from_the_shell(work):
    done = command("--model=SLIFMR", "--dataset=tiny", "--knn_kk=5", cwd=work)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown setting 'knn_kk'")
    assert "Traceback" not in done.stderr


def test_an_unknown_command_is_named(work):
    done = command("trian", cwd=work)
    assert done.returncode == 2 and "trian" in done.stderr


# -- the wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_wheel_runs_from_an_empty_folder(tmp_path):
    dist, site, empty = tmp_path / "dist", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from recbole_slifmr.cli import main; main()"
    arguments = ["train", "--dataset=toy", "--epochs=1", "--show_progress=False", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=empty, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "SLIFMR on toy" in done.stdout and "knowledge graph:" in done.stderr + done.stdout
    where = f"import sys; sys.path.insert(0, {str(site)!r}); import recbole_slifmr.paths as p; print(p.PROPERTIES)"
    shown = subprocess.run([sys.executable, "-c", where], cwd=empty, capture_output=True, text=True, check=True).stdout
    assert Path(shown.strip()) == site / "recbole_slifmr" / "properties"
