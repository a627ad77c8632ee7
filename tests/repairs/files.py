"""Repairs of what RecBole reads and writes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from recbole_slifmr.host import compat
from repairs.tiny import apply_only, check, join, read, settings, start, succeeds


@check
def check_checkpoint_loading() -> None:
    """A test of the best model cannot load it without the repair; what is not listed stays refused."""
    import pickle

    from recbole.config import Config

    from recbole_slifmr.errors import SettingError
    from recbole_slifmr.host.stored import allow_in_checkpoints

    compat.apply(skip={"checkpoint_loading", "evaluated_strings"})
    trainer, (train, valid, test) = start("BPR")
    trainer.fit(train, valid, verbose=False)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        trainer.evaluate(test)
    assert apply_only("checkpoint_loading") == ["checkpoint_loading"]
    assert trainer.evaluate(test)["recall@5"] >= 0
    loaded = read(trainer.saved_model_file)["config"]
    assert type(loaded) is Config
    assert loaded.final_config_dict == trainer.config.final_config_dict
    assert loaded.model_class is type(trainer.model)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        torch.load(trainer.saved_model_file)  # as without this package

    torch.save({"kept": Listed}, "listed.pth")
    with pytest.raises(SettingError, match="Listed, which no checkpoint needs"):
        read("listed.pth")
    allow_in_checkpoints(Listed)
    assert not callable(read("listed.pth")["kept"])
    torch.save(Listed(), "listed.pth")
    with pytest.raises(SettingError):
        read("listed.pth")

    torch.save(Attack(), "attack.pth")  # Config evaluates the strings among its settings
    with pytest.raises(SettingError, match="cannot be read as a checkpoint"):
        trainer.resume_checkpoint("attack.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("attack.pth")
    assert not Path("attacked").exists()
    torch.load("attack.pth", weights_only=False)
    assert Path("attacked").exists()  # the file was dangerous


class Listed:
    """A class of one's own in a checkpoint."""


class Attack:
    """What a file looks like that asks for the settings to be built."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Ask for a `Config` with a setting that writes a file."""
        from recbole.config import Config

        return Config, ("BPR", "tiny", None, {"data_path": os.getcwd(), "x": "open('attacked', 'w').close()"})


@check
def check_pickled_files() -> None:
    """RecBole unpickles whatever lies beside its checkpoints; with the repair, what it has saved itself."""
    import pickle

    from recbole.data import create_dataset, data_preparation
    from recbole.data.utils import load_split_dataloaders

    from recbole_slifmr.errors import DataError

    compat.apply(skip={"pickled_files", "evaluated_strings"})

    def load(**changes: Any) -> Any:
        config = settings("BPR", **changes)
        return load_split_dataloaders(config) or data_preparation(config, create_dataset(config))

    files = [Path("saved/tiny-Dataset.pth"), Path("saved/tiny-for-BPR-dataloader.pth")]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(pickle.dumps(Attack()))
        with contextlib.suppress(Exception):
            load()
        assert Path("attacked").exists()
        Path("attacked").unlink()
        file.unlink()
    assert apply_only("pickled_files") == ["pickled_files"]
    for file in files:
        file.write_bytes(pickle.dumps(Attack()))
        with pytest.raises(DataError, match=f"{file} was not written by you"):
            load()
        file.unlink()
    assert not Path("attacked").exists()
    saved = load(save_dataset=True, save_dataloaders=True)[0].dataset.inter_feat.interaction
    for _ in files:  # the data set from its file, then the loaders, too
        again = load()[0].dataset.inter_feat.interaction
        assert all(torch.equal(again[name], saved[name]) for name in saved)
        files.pop().write_bytes(b"")

    sys.modules["recbole.model.general_recommender.ldiffrec"].np.save("item_emb.npy", np.array([Attack()]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        sys.modules["recbole.model.general_recommender.ldiffrec"].np.load("item_emb.npy", allow_pickle=True)


@check
def check_evaluated_strings() -> None:
    """A string among the settings is evaluated without the repair; with it, values are read and nothing runs."""
    from recbole.model.context_aware_recommender import kd_dagfm

    code = "open('attacked', 'w').close()"
    compat.apply(skip={"evaluated_strings"})
    settings("BPR", extra=code)
    assert Path("attacked").exists()
    Path("attacked").unlink()
    assert apply_only("evaluated_strings") == ["evaluated_strings"]
    read = settings("BPR", extra=code, sizes="[8, 4]", rate="1e-3", flag="True", nothing="None", word="len")
    assert (read["extra"], read["sizes"], read["rate"], read["flag"]) == (code, [8, 4], 1e-3, True)
    assert (read["nothing"], read["word"]) == (None, "len")
    assert vars(kd_dagfm)["eval"]("CrossNet") is kd_dagfm.CrossNet
    for name in (code, "nn", "KD_DAGFM(None, None)"):
        with pytest.raises(ValueError, match="KD_DAGFM has no network"):
            vars(kd_dagfm)["eval"](name)
    assert not Path("attacked").exists()


@check
def check_readers() -> None:
    """Every module of RecBole that reads tensors, unpickles or evaluates is one that is repaired."""
    import re

    import recbole

    root = Path(recbole.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        name = ".".join(("recbole", *path.relative_to(root).with_suffix("").parts))
        for pattern in (r"torch\.load\(", r"pickle\.\w+\(|allow_pickle=True", r"(?<![\w.])eval\(", r"(?<!\w)exec\("):
            if re.search(pattern, path.read_text()):
                found.setdefault(pattern, set()).add(name)
    expected = [
        {*compat.files.READERS, "recbole.quick_start.quick_start"},
        {name for name, _ in compat.files.PICKLES},
        set(compat.files.EVALUATE),
    ]
    assert list(map(sorted, found.values())) == list(map(sorted, expected))


@check
def check_checkpoint_saving() -> None:
    """RecBole writes what torch refuses, and spoils the file if it is stopped; the repair does neither."""
    import pickle

    from recbole.trainer import PretrainTrainer, Trainer

    compat.apply(skip={"checkpoint_saving"})
    trainer, _ = start("BPR")
    trainer._save_checkpoint(0, verbose=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trainer.saved_model_file)
    save = torch.save

    def stop(state: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_text("half")
        raise KeyboardInterrupt

    def interrupt() -> None:
        torch.save = stop
        with pytest.raises(KeyboardInterrupt):
            trainer._save_checkpoint(1, verbose=False)
        torch.save = save

    interrupt()
    assert Path(trainer.saved_model_file).read_text() == "half"

    assert apply_only("checkpoint_saving") == ["checkpoint_saving"]
    trainer._save_checkpoint(0)
    interrupt()
    state = read(trainer.saved_model_file)
    assert os.listdir("saved") == [os.path.basename(trainer.saved_model_file)]
    names = {"config", "epoch", "cur_step", "best_valid_score", "state_dict", "other_parameter", "optimizer"}
    assert set(state) == names
    assert state["epoch"] == 0
    trainer.resume_checkpoint(trainer.saved_model_file)
    assert trainer.start_epoch == 1

    pretrainer = PretrainTrainer(trainer.config, trainer.model)
    pretrainer.save_pretrained_model(0, "pretrained.pth")
    torch.save = stop
    with pytest.raises(KeyboardInterrupt):
        pretrainer.save_pretrained_model(1, "pretrained.pth")
    torch.save = save
    assert read(pretrainer.saved_model_file)["epoch"] == 0
    assert not list(Path().glob("*.part"))

    class Extended(Trainer):
        def _checkpoint_state(self, epoch: int) -> dict[str, Any]:
            return {**super()._checkpoint_state(epoch), "more": epoch}

    extended = Extended(trainer.config, trainer.model)
    extended._save_checkpoint(7, saved_model_file=Path("elsewhere.pth"))
    assert read("elsewhere.pth")["more"] == 7

    waited: list[bool] = []
    torch.distributed.barrier = lambda: waited.append(Path("shared.pth").exists())
    trainer.config["single_spec"], trainer.config["local_rank"] = False, 1
    trainer._save_checkpoint(8, saved_model_file="shared.pth")
    trainer.config["local_rank"] = 0
    trainer._save_checkpoint(8, saved_model_file="shared.pth")
    assert waited == [False, True], "the first process writes, and no other goes on before"
    saved = read("shared.pth")["config"]
    assert (saved["single_spec"], trainer.config["single_spec"]) == (True, False)


@check
def check_run_names() -> None:
    """Runs of one second share files without the repair; with it, only the processes of one run do."""
    from recbole.trainer import Trainer
    from recbole.utils import get_tensorboard, init_logger

    def names() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"checkpoint": set(), "log": set(), "board": set()}
        for _ in range(4):  # of which at least two fall into the same second
            found["checkpoint"].add(Trainer(config, model).saved_model_file)
            root = logging.getLogger()
            root.handlers.clear()
            found["board"].add(get_tensorboard(root).log_dir)
            init_logger(config)
            found["log"].add(root.handlers[-1].baseFilename)
        return found

    compat.apply(skip={"run_names"})
    trainer, _ = start("BPR")
    config, model = trainer.config, trainer.model
    assert all(len(found) < 4 for found in names().values())
    assert apply_only("run_names") == ["run_names"]
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    found = names()
    assert {kind: len(paths) for kind, paths in found.items()} == {"checkpoint": 4, "log": 4, "board": 4}
    assert all(path.startswith("saved") and path.endswith(".pth") for path in found["checkpoint"])
    assert (random.getstate(), np.random.get_state()[2]) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])

    def name_of(rank: int) -> None:
        join(rank, 2)
        Path(f"rank{rank}").write_text(Trainer(config, model).saved_model_file)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    config["single_spec"] = False
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module: module
    importlib.import_module("recbole.trainer.trainer").DistributedDataParallel = lambda module, **_: module
    succeeds(lambda: name_of(1), meanwhile=lambda: name_of(0))
    assert Path("rank0").read_text() == Path("rank1").read_text()


@check
def check_shared_folders() -> None:
    """Another process makes the folder between the look and the making."""
    from recbole.data import utils as data_utils
    from recbole.utils import ensure_dir, logger, utils

    compat.apply(skip={"shared_folders"})
    look = os.path.exists
    slow = patch.object(os.path, "exists", lambda path: look(path) or bool(os.makedirs(path)))
    with slow, pytest.raises(FileExistsError):
        ensure_dir("first/saved")
    assert apply_only("shared_folders") == ["shared_folders"]
    with patch.object(os.path, "exists", lambda path: False):
        for number, module in enumerate((utils, logger, data_utils)):
            for _ in range(2):
                module.ensure_dir(f"second/{number}")
            assert os.path.isdir(f"second/{number}")
