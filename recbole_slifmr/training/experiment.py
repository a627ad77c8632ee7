"""One run: settings in, result out."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import KnowledgeBasedDataLoader, TrainDataLoader
from recbole.utils import InputType, ModelType, get_model, get_trainer, init_seed

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.compat.processes import without_board
from recbole_slifmr.host.settings import bad_input, make_config
from recbole_slifmr.training.checkpoint import check_data, check_optimizer, data_record, read_checkpoint
from recbole_slifmr.training.evaluation import evaluate, mask_training_items_only
from recbole_slifmr.training.fingerprint import fingerprint, input_fingerprints
from recbole_slifmr.training.follow import tell_end
from recbole_slifmr.training.log import end_log, start_log
from recbole_slifmr.training.ranking import with_ranking
from recbole_slifmr.training.shared import Splits
from recbole_slifmr.training.trainer import make_callbacks

UNBUILDABLE = (ValueError, NotImplementedError, RuntimeError, TypeError)  # raised over settings by models and trainers


@dataclass
class Result:
    """What a run gave.

    Attributes:
        model: name of the model.
        dataset: name of the data set.
        seed: of the training.
        valid: metric by name, of the best epoch, on the validation split.
        test: metric by name, of the same epoch, on the test split; empty if it was not asked for.
        best_valid_score: the value of ``valid_metric``.
        checkpoint: the file that holds the best epoch; None if nothing was saved.
        log_file: RecBole's log.
        curve: per validated epoch its number, the seconds since training began and the validation score.
        best_epoch: the epoch that the trainer kept and that is tested: of equal scores the last, without validation the
            last of all.
        n_epochs: epochs trained in this run.
        seconds: of training and validation.
        validation_seconds: those of validation among them; 0 for a model that RecBole's ``Trainer`` does not train.
        n_parameters: trainable parameters.
        fingerprints: hash of each split; see :func:`~recbole_slifmr.training.fingerprint.fingerprint`.
        inputs: hash of the knowledge graph and of the features of each modality, as far as the model reads them.
        traces: what the callbacks noted, such as ``refreshes`` and ``diagnostics``, an entry per event.
        per_user: test metrics by user token; None unless ``detailed``.
    """

    model: str
    dataset: str
    seed: int
    valid: dict[str, float]
    test: dict[str, float]
    best_valid_score: float
    checkpoint: Path | None
    log_file: Path | None
    curve: list[tuple[int, float, float]]
    best_epoch: int | None
    n_epochs: int
    seconds: float
    n_parameters: int
    fingerprints: dict[str, str]
    inputs: dict[str, str]
    traces: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    validation_seconds: float = 0.0
    per_user: pd.DataFrame | None = field(repr=False, default=None)


class Prepared(NamedTuple):
    """Everything of a run before its first epoch."""

    config: Config
    train_data: Any
    valid_data: Any
    test_data: Any
    trainer: Any

    def fingerprints(self) -> dict[str, str]:
        """Return the hash of each split."""
        loaders = {"train": self.train_data, "valid": self.valid_data, "test": self.test_data}
        return {name: fingerprint(loader) for name, loader in loaders.items()}

    def inputs(self) -> dict[str, str]:
        """Return the hash of the knowledge graph and of each modality, as far as the model reads them."""
        return input_fingerprints(self.train_data._dataset)


def run(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    split_seed: int | None = None,
    test_mask: str = "train_valid",
    detailed: bool = False,
    quiet: bool = False,
    on_start: Callable[[Prepared], None] | None = None,
    on_valid: Callable[[int, float, float, bool], None] | None = None,
    splits: Splits | None = None,
    log: bool = True,
) -> Result:
    """Train a model, choose the epoch on the validation split, score that epoch once on the test split.

    Args:
        model: name of a model of this package or of RecBole, or ``package.module:Class`` of one of your own.
        dataset: name of the data set's folder under ``data_path``.
        config_files: YAML files of settings, the later ones win.
        settings: settings that win over the files.
        resume: checkpoint to go on from.
        split_seed: seed of a random split; that of the training if None.
        test_mask: what is never recommended at test time: training and validation items (``train_valid``, as RecBole
            does) or training items only (``train``, as MMRec does).
        detailed: whether to keep the metrics of each user and those by popularity and activity.
        quiet: whether to print no more of the log than warnings and errors, and no bars; the log file has all of it.
        on_start: called with everything of the run before its first epoch.
        on_valid: called after each validation with epoch, seconds, score and whether it is the best so far.
        splits: of just these settings of the data; read here if None.
        log: whether to keep a log and a file for TensorBoard in the working directory.

    Returns:
        the result.

    Raises:
        SettingError: for an unknown setting or one that cannot be used.
        DataError: for data that cannot be used.
    """
    config = make_config(model, dataset, config_files, settings)
    _check_wandb(config)
    set_threads(config)
    if not log:
        end_log()  # of an earlier run: its file is not that of this one
    log_file = start_log(config, quiet) if log else None
    getLogger().info(config)
    if not config["single_spec"]:
        getLogger().info(f"{config['world_size']} processes on {config['device'].type}")
    with contextlib.nullcontext() if log else without_board():
        prepared = prepare(config, split_seed, splits)
    if detailed and len(prepared.test_data._dataset) == 0:
        raise DataError(f"the test split of '{config['dataset']}' is empty: check eval_args and the files")
    trainer = prepared.trainer
    getLogger().info(trainer.model)
    if resume is not None:
        _resume(prepared, Path(resume))
    if on_start is not None and config["local_rank"] == 0:
        on_start(prepared)
    show_progress = config["show_progress"] and not quiet

    curve: list[tuple[int, float, float]] = []
    best_epoch = trainer.start_epoch - 1 if resume is not None else None
    start = perf_counter()

    def record(epoch: int, score: float) -> None:
        nonlocal best_epoch
        curve.append((epoch, perf_counter() - start, float(score)))
        is_best = trainer.cur_step == 0  # evaluations since the one that RecBole kept
        if is_best:
            best_epoch = epoch
        if on_valid is not None:
            on_valid(*curve[-1], is_best)

    best_score, best_result = trainer.fit(
        prepared.train_data, prepared.valid_data, show_progress=show_progress, callback_fn=record
    )
    seconds = perf_counter() - start
    if not curve and trainer.train_loss_dict:  # without validation each epoch replaces the one before
        best_epoch = max(trainer.train_loss_dict)
    if test_mask == "train":
        mask_training_items_only(prepared.test_data, prepared.train_data)
    per_user = None
    if detailed:
        test_result, per_user = evaluate(trainer, prepared.test_data, prepared.train_data)
    else:
        test_result = trainer.evaluate(prepared.test_data, show_progress=show_progress)
    result = Result(
        model=config["model"],
        dataset=config["dataset"],
        seed=config["seed"],
        valid=dict(best_result or {}),
        test=dict(test_result or {}),
        best_valid_score=float(best_score),
        checkpoint=Path(trainer.saved_model_file),
        log_file=log_file,
        curve=curve,
        best_epoch=best_epoch,
        n_epochs=len(trainer.train_loss_dict),
        seconds=seconds,
        n_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        fingerprints=prepared.fingerprints(),
        inputs=prepared.inputs(),
        traces={c.trace: c.history for c in getattr(trainer, "callbacks", ()) if getattr(c, "trace", None) is not None},
        validation_seconds=getattr(trainer, "validation_seconds", 0.0),
        per_user=per_user,
    )
    tell_end(trainer, result)
    return result


def prepare(config: Config, split_seed: int | None = None, splits: Splits | None = None) -> Prepared:
    """Read and split the data, build model and trainer.

    Args:
        config: RecBole's configuration.
        split_seed: seed of a random split; that of the training if None.
        splits: of these settings of the data; read here if None.

    Raises:
        DataError, SettingError: for data or settings that cannot be used.
    """
    split_seed = config["seed"] if split_seed is None else split_seed
    train, valid, test = load_data(config, split_seed, splits)
    trainer = make_trainer(config, train)
    trainer.data_record = data_record(train._dataset, split_seed)
    return Prepared(config, train, valid, test, trainer)


def load_data(config: Config, split_seed: int | None = None, splits: Splits | None = None) -> tuple[Any, Any, Any]:
    """Read and split the data; return the loaders of training, validation and test, see :func:`prepare`."""
    if config["save_dataloaders"] and config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        raise SettingError(f"save_dataloaders: RecBole cannot save the loaders of {config['model']}: leave it out")
    with _reading():
        if splits is None:
            data = _create_dataset(config, split_seed)
        else:
            data = splits.adopt(config).dataset
            getLogger().info(data)
        _check_topk(config, data)
        loaders = data_preparation(config, data)
    _check_targets(config, loaders[0])
    return loaders


def read_splits(config: Config, split_seed: int | None = None) -> Splits:
    """Read and split the data without making loaders, see :func:`prepare`."""
    with _reading():
        data = _create_dataset(config, split_seed)
        return Splits(data, data.build())


def _create_dataset(config: Config, split_seed: int | None) -> Any:
    """Read the data, with the random state from which they are split."""
    init_seed(config["seed"] if split_seed is None else split_seed, config["reproducibility"])
    data = create_dataset(config)
    getLogger().info(data)
    return data


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turn RecBole's errors over data into this package's, and pass over pandas' warning on every column."""
    with bad_input(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="recbole")
        yield


def _check_topk(config: Config, data: Any) -> None:
    if max(config["topk"]) > data.item_num:
        raise SettingError(
            f"topk: {max(config['topk'])} is more than the {data.item_num - 1} items of '{config['dataset']}'"
        )


def _check_targets(config: Config, train: Any) -> None:
    """Refuse training data from which a model of RecBole's cannot tell what a user likes less."""
    own = not config.model_class.__module__.startswith("recbole.")
    if own or config["MODEL_TYPE"] in (ModelType.TRADITIONAL, ModelType.SEQUENTIAL):
        return
    samples = config["train_neg_sample_args"]["distribution"] != "none"
    if samples or not isinstance(train, (TrainDataLoader, KnowledgeBasedDataLoader)):
        return
    if config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE:
        raise SettingError(
            f"train_neg_sample_args: {config['model']} learns from sampled negative items: name a distribution"
        )
    if config["LABEL_FIELD"] not in train._dataset.inter_feat:
        raise SettingError(
            f"{config['model']} learns from labels, and the interactions of '{config['dataset']}' have no column "
            f"'{config['LABEL_FIELD']}': make it of another column with threshold, such as {{rating: 3}}"
        )


def make_trainer(config: Config, train_data: Any, adapt: Callable[[type], type] = with_ranking) -> Any:
    """Build model and trainer.

    Args:
        config: RecBole's configuration.
        train_data: the loader of the training split.
        adapt: makes the class of the trainer from RecBole's choice.

    Raises:
        SettingError: for settings that cannot be used.
    """
    with bad_input(SettingError, UNBUILDABLE):
        init_seed(config["seed"], config["reproducibility"])
        network = get_model(config["model"])(config, train_data._dataset).to(config["device"])
        trainer = adapt(get_trainer(config["MODEL_TYPE"], config["model"]))(config, network)
    trainer.eval_step = min(trainer.eval_step, trainer.epochs)  # RecBole forgets it where a model has one epoch
    if not config["single_spec"]:  # the same model everywhere, but negatives of its own for each process
        init_seed(config["seed"] + config["offset"] + config["local_rank"], config["reproducibility"])
    return trainer


def check_model(config: Config, dataset: Any) -> None:
    """Refuse settings and data that the model or its trainer cannot do with.

    A model with a ``check``, as those of this package have, says so without being built. Any other is built, without an
    optimiser, unless building it is all of its training, as with RecBole's EASE.

    Args:
        config: RecBole's configuration.
        dataset: the training split.

    Raises:
        DataError, SettingError: for settings or data that cannot be used.
    """
    kind = get_model(config["model"])
    with bad_input(SettingError, UNBUILDABLE):
        for name in ("learning_rate", "weight_decay"):
            if config[name] is not None and config[name] < 0:
                raise SettingError(f"{name} must be at least 0, not {config[name]}")
        if hasattr(kind, "check"):
            kind.check(config, dataset)
            make_callbacks(config, kind)
        elif kind.type != ModelType.TRADITIONAL:
            init_seed(config["seed"], config["reproducibility"])
            network = kind(config, dataset).to(config["device"])
            _without_optimizer(with_ranking(get_trainer(config["MODEL_TYPE"], config["model"])))(config, network)


def _without_optimizer(trainer_class: type) -> type:
    """Return a trainer that builds no optimiser, for which torch imports its compiler first: seconds."""
    return type(trainer_class.__name__, (trainer_class,), {"_build_optimizer": lambda self, **kwargs: None})


def set_threads(config: Config) -> None:
    """Use as many CPU threads as the setting ``threads`` says; torch's own choice if it is empty.

    Raises:
        SettingError: if it is no positive number.
    """
    threads = read_threads(config)
    if threads is not None:
        torch.set_num_threads(threads)


def read_threads(config: Config) -> int | None:
    """Return the setting ``threads``.

    Raises:
        SettingError: if it is neither empty nor a positive number.
    """
    threads = config["threads"]
    if threads is not None and (type(threads) is not int or threads < 1):
        raise SettingError(f"threads must be a whole number from 1, not {threads!r}")
    return threads


def _check_wandb(config: Config) -> None:
    """Refuse to log to Weights & Biases without its package, before the data are read."""
    if config["log_wandb"] and importlib.util.find_spec("wandb") is None:
        raise SettingError("log_wandb: wandb is not installed: pip install wandb, or leave log_wandb out")


def _resume(prepared: Prepared, checkpoint: Path) -> None:
    state, own = read_checkpoint(checkpoint), prepared.config["model"]
    if state["config"]["model"] != own:
        raise SettingError(f"{checkpoint} is no checkpoint of {own}, but of {state['config']['model']}")
    check_data(checkpoint, state, prepared.train_data._dataset)
    try:
        prepared.trainer.resume_checkpoint(checkpoint)
        check_optimizer(checkpoint, prepared.trainer.optimizer)
    except SettingError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingError(f"{checkpoint} is no checkpoint of this model, data set and learner: {reason}") from error
