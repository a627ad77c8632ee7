"""No file runs code, whatever it names; a checkpoint is whole or absent, whatever happens to the run."""

import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import QUIET, write_tiny
from recbole.config import Config

from recbole_slifmr.cli import main
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host import stored
from recbole_slifmr.host.seal import seal, unseal
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import run

NAMES = sorted({name for _, name in stored.allowed_globals()})
CODE = "open('attacked', 'w').close()"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of BPR on the tiny set, in the folder of the set's folder."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder)
    settings = {**QUIET, "epochs": 1, "data_path": str(folder), "checkpoint_dir": str(folder / "saved")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run("BPR", "tiny", settings=settings).checkpoint.resolve()


def with_program(good, path, program):
    """Copy a checkpoint and have its pickle run a program whose result is one entry more."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("/data.pkl"):
                content = content[:-1] + text("more") + program + b"s."
            new.writestr(info.filename, content)


def text(words):
    return b"X" + len(words.encode()).to_bytes(4, "little") + words.encode()


def named(name):
    module, _, attribute = name.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


SETTINGS = b"}(" + text("teacher") + text(CODE) + text("extra") + text(CODE) + b"u"  # a dictionary
ARGUMENTS = {
    "nothing": b")",
    "code": text(CODE) + b"\x85",
    "settings": SETTINGS + b"\x85",
    "settings and data": SETTINGS + SETTINGS + b"\x86",
    "code twice": text(CODE) + text(CODE) + b"\x86",
}
USES = {"call": b"R", "create": b"\x81", "create and fill in": b"\x81" + SETTINGS + b"b", "fill in": SETTINGS + b"b"}


@pytest.mark.parametrize("use", USES)
def test_a_file_calls_creates_and_fills_in_nothing_that_it_names(monkeypatch, use):
    called = []
    for kind in {stand_in.kind for stand_in, _ in stored.allowed_globals() if isinstance(stand_in, stored._Name)}:
        if kind.__module__.startswith("recbole"):
            monkeypatch.setattr(kind, "__init__", lambda self, *args, **kwargs: called.append(type(self)))
    torch.save({}, "empty.pth")
    kept = 0
    for name in NAMES:
        for arguments in [b""] if use == "fill in" else ARGUMENTS.values():
            with_program("empty.pth", "bad.pth", named(name) + arguments + USES[use])
            try:
                more = stored.read_stored("bad.pth")["more"]
            except SettingError:
                continue
            kept += 1
            assert type(more) in (dict, bytes, Config) or isinstance(more, np.dtype), (name, type(more))
    assert not called and not Path("attacked").exists()
    assert sorted(os.listdir()) == ["bad.pth", "empty.pth"]
    assert kept or use != "call", "an empty defaultdict may be built"


def test_names_alone_are_kept():
    torch.save({}, "empty.pth")
    for name in NAMES:
        with_program("empty.pth", "named.pth", named(name))
        assert "more" in stored.read_stored("named.pth")


def test_a_member_of_an_enumeration_cannot_be_changed(trained):
    from recbole.utils import ModelType

    fill_in = named("recbole.utils.enum_type.ModelType") + b"K\x01\x85R}" + text("_value_") + b"K\x63sb"
    with_program(trained, "bad.pth", fill_in)
    with pytest.raises(SettingError, match="cannot be read as a checkpoint"):
        read_checkpoint("bad.pth")
    assert ModelType(1).value == 1


class Reduced:
    """Is saved as a call, and what its object is filled in with."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_a_forged_type_does_not_take_bytes_for_objects():
    fields = Reduced(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 0))
    array = Reduced(np.ndarray(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), fields, False, b"12345678"))
    objects = Reduced(
        np.ndarray(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, b"1" * 8)
    )
    for content in (fields, array, objects, Reduced(np.float64(0).__reduce__()[0], (np.dtype("O"), b"12345678"))):
        torch.save({"more": content}, "bad.pth")
        with pytest.raises(SettingError, match="damaged"):
            stored.read_stored("bad.pth")
    shared = Reduced(np.dtype, ("f4",), (3, ">", None, None, None, -1, -1, 0))
    torch.save({"more": shared}, "kept.pth")
    stored.read_stored("kept.pth")
    assert np.dtype("f4").isnative, "the one that all share"


@pytest.mark.parametrize("kind", [sp.coo_matrix, sp.csr_matrix, sp.csc_matrix, sp.lil_matrix])
def test_matrices_come_back_and_do_not_reach_outside_themselves(kind):
    matrix = kind(np.array([[0, 2.5, 0], [1, 0, 3]]))
    torch.save({"matrix": matrix, "again": matrix, "dense": matrix.todense()}, "good.pth")
    found = stored.read_stored("good.pth")
    assert type(found["matrix"]) is kind and found["again"] is found["matrix"]
    assert (found["matrix"] != matrix).nnz == 0
    assert type(found["dense"]) is np.matrix and (found["dense"] == matrix.todense()).all()
    outside = kind((2, 3))
    for name, value in vars(matrix).items():
        setattr(outside, name, value)
    outside._shape = (2, 1)
    torch.save(outside, "bad.pth")
    with pytest.raises(SettingError, match="damaged"):
        stored.read_stored("bad.pth")


def test_arrays_and_numbers_come_back():
    values = {
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "number": np.float32(1.5),
        "lists": np.array([[1], [2, 3], None], dtype=object)[:2],
        "deep": [({"x": (np.int64(3),)},)],
    }
    torch.save(values, "good.pth")
    found = stored.read_stored("good.pth")
    for name in ("array", "columns", "empty", "flags", "lists"):
        assert found[name].dtype == values[name].dtype and found[name].shape == values[name].shape, name
        assert found[name].tolist() == values[name].tolist()
    assert found["number"] == np.float32(1.5) and type(found["number"]) is np.float32
    assert found["deep"] == [({"x": (3,)},)]


def test_what_others_allow_torch_to_read_stays_as_it_was(trained):
    listed = torch.serialization.get_safe_globals()
    assert not any(getattr(entry, "__module__", "").startswith(("recbole", "numpy", "yaml")) for entry in listed)
    with torch.serialization.safe_globals([np.dtype, np.ndarray]):  # one's own list, with names that are ours too
        now = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(trained)["epoch"] == 0
        assert set(torch.serialization.get_safe_globals()) == now
    with pytest.raises(SettingError):
        read_checkpoint(__file__)
    assert set(torch.serialization.get_safe_globals()) == set(listed)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained)


def slifmr(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip().splitlines()
    return stop.value.code, error[-1] if error else ""


ATTACK = named("recbole.config.configurator.Config") + b"(" + text("BPR") + text("tiny") + b"N" + SETTINGS + b"tR"


def train(trained, *more):
    return ["train", "--model=BPR", "--dataset=tiny", f"--data_path={trained.parents[1]}", "--epochs=2", "--topk=[5]",
            "--valid_metric=Recall@5", "--state=ERROR", "--show_progress=False", *more]  # fmt: skip


def test_commands_and_recbole_itself_refuse_the_file(trained, capsys):
    from recbole.quick_start import load_data_and_model

    with_program(trained, "bad.pth", ATTACK)
    for arguments in (
        train(trained, "--resume=bad.pth"),
        ["recommend", "--checkpoint=bad.pth", "--all"],
        ["export", "--checkpoint=bad.pth", "--out=vectors"],
    ):
        status, error = slifmr(capsys, *arguments)
        assert status == 2 and error.startswith("error: bad.pth cannot be read as a checkpoint")
    with pytest.raises(SettingError, match="cannot be read as a checkpoint"):
        load_data_and_model("bad.pth")
    assert not Path("attacked").exists() and not Path("vectors").exists()
    assert load_data_and_model(str(trained))[0]["model"] == "BPR"


def test_load_data_and_model_unpickles_nothing_from_elsewhere(trained):
    from recbole.quick_start import load_data_and_model

    state = read_checkpoint(trained)
    state["config"].final_config_dict.update(dataset_save_path="data.pkl")
    torch.save(state, "bad.pth")
    Path("data.pkl").write_bytes(pickle.dumps(Reduced(os.system, ("touch attacked",))))
    with pytest.raises(ValueError, match=r"data\.pkl was not written by you"):
        load_data_and_model("bad.pth")
    assert not Path("attacked").exists()


@pytest.mark.parametrize("file", ["tiny-Dataset.pth", "tiny-SLIFMRDataset.pth", "tiny-for-BPR-dataloader.pth"])
def test_train_unpickles_no_data_set_from_elsewhere(trained, capsys, file):
    folder = Path("saved")
    folder.mkdir()
    (folder / file).write_bytes(pickle.dumps(Reduced(os.system, ("touch attacked",))))
    status, error = slifmr(capsys, *train(trained))
    assert status == 0 or (status == 2 and "was not written by you" in error)
    assert (status == 2) == (file != "tiny-Dataset.pth"), "that of BPR is a SLIFMRDataset"
    assert not Path("attacked").exists()


def test_settings_in_a_file_are_read_and_not_evaluated(trained, capsys):
    Path("settings.yaml").write_text(f'extra: "{CODE}"\nx: !!python/object/apply:os.system ["touch attacked"]\n')
    status, error = slifmr(capsys, *train(trained, "--config_files=settings.yaml"))
    assert status == 2 and "is not YAML" in error
    with pytest.warns(UserWarning, match="unknown setting"):
        config = make_config("BPR", "toy", settings={"extra": CODE})
    assert config["extra"] == CODE and not Path("attacked").exists()


def test_a_seal_is_that_of_one_key(monkeypatch, tmp_path):
    sealed = seal(b"content")
    assert unseal(sealed, "x") == b"content"
    for bad in (b"", b"content", sealed[:-1], b"C" + sealed[1:], sealed + b"."):
        with pytest.raises(ValueError, match="x was not written by you"):
            unseal(bad, "x")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="x was not written by you"):
        unseal(sealed, "x")
    key = tmp_path / "recbole-slifmr" / "key"
    assert key.stat().st_mode & 0o077 == 0 and os.listdir(key.parent) == ["key"]


# -- one line --------------------------------------------------------------------------------------------------------

LINES = {
    "no pretrained NeuMF": ("NeuMF", ["--use_pretrain=True", "--mf_pretrain_path=no.pth", "--mlp_pretrain_path=no.pth"],
                            "error: checkpoint no.pth not found"),
    "no pretrained RaCT": ("RaCT", ["--train_stage=finetune", "--pre_model_path=no.pth"],
                           "error: checkpoint no.pth not found"),
    "no wandb": ("BPR", ["--log_wandb=True"], "error: log_wandb: wandb is not installed: pip install wandb"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_what_is_missing_is_said_in_one_line(trained, capsys, monkeypatch, case):
    model, arguments, line = LINES[case]
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    status, error = slifmr(capsys, *train(trained), f"--model={model}", *arguments)
    assert status == 2 and error.startswith(line)


def test_a_checkpoint_of_ripplenet_is_read(trained, capsys):
    status, error = slifmr(capsys, *train(trained, "--n_memory=2", "--n_hop=1"), "--model=RippleNet")
    assert status == 0, error


def test_an_optimiser_of_other_shapes_is_refused(trained, capsys):
    state = read_checkpoint(trained)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    torch.save(state, "bad.pth")
    status, error = slifmr(capsys, *train(trained, "--resume=bad.pth"))
    assert (status, error) == (2, "error: bad.pth holds the state of an optimiser for parameters of other shapes")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few hundred kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before_it(trained, small_disk, capsys):
    arguments = train(trained, f"--checkpoint_dir={small_disk}")
    assert slifmr(capsys, *arguments)[0] == 0
    (before,) = small_disk.iterdir()
    content = before.read_bytes()
    status, error = slifmr(capsys, *arguments, "--embedding_size=4096")
    assert status == 1 and error.startswith(f"error: checkpoint {small_disk}") and "cannot be saved" in error
    assert list(small_disk.iterdir()) == [before] and before.read_bytes() == content


MOMENTS = """
import os, signal, sys, time
from pathlib import Path
import torch
from recbole_slifmr.cli import main
save, count = torch.save, 0

def stopped(state, path, **kwargs):
    global count
    count += 1
    if count == number and when == "during":
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), sent)
        time.sleep(60)
    save(state, path, **kwargs)
    if count == number and when == "before the move":
        os.kill(os.getpid(), sent)
        time.sleep(60)

for name in sys.argv[1].split(","):
    for sent in (signal.SIGTERM, signal.SIGKILL):
        when, _, number = name.rpartition(" ")
        number = int(number)
        child = os.fork()
        if child == 0:
            os.makedirs(f"{when}-{number}-{sent:d}")
            os.chdir(f"{when}-{number}-{sent:d}")
            torch.save = stopped
            sys.stdout = open("out.txt", "w")
            main(sys.argv[2:])
        _, status = os.waitpid(child, 0)
        print(f"{when}-{number}-{sent:d}", os.WTERMSIG(status) == sent, flush=True)
"""


def test_a_killed_run_leaves_a_whole_checkpoint_or_none(trained):
    moments = ["during 1", "before the move 1", "during 2", "before the move 2"]
    arguments = train(trained, "--epochs=3", "--learning_rate=0.05", "--stopping_step=9")
    arguments.remove("--epochs=2")
    done = subprocess.run([sys.executable, "-c", MOMENTS, ",".join(moments), *arguments],
                          capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    reports = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [killed for _, killed in reports] == ["True"] * 8, done.stdout + done.stderr
    for folder, _ in reports:
        found = list(Path(folder, "saved").glob("*.pth"))
        assert len(found) == (folder.split("-")[1] == "2"), "the first save, or the one before the second"
        for file in found:
            read_checkpoint(file)
