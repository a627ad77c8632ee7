"""One run in several processes: data parallelism."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.trainer import PretrainTrainer
from recbole.utils import ModelType, get_trainer

from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.distributed import launch, stay_on_this_machine
from recbole_slifmr.training.experiment import Prepared, Result, run
from recbole_slifmr.training.log import ignore_deprecations


def run_distributed(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    nproc: int = 2,
    ip: str | None = None,
    port: int | None = None,
    world_size: int = -1,
    group_offset: int = 0,
    quiet: bool = False,
    on_start: Callable[[Prepared], None] | None = None,
) -> Result:
    """Run with data parallelism: ``nproc`` processes on this machine share each batch and average their gradients.

    Each process takes a GPU, over NCCL; where there are fewer GPUs than processes all are on the CPU, over Gloo.

    Args:
        model: name of a model of this package or of RecBole, or ``package.module:Class`` of one of your own.
        dataset: name of the data set's folder under ``data_path``.
        config_files: YAML files of settings, the later ones win.
        settings: settings that win over the files. ``train_batch_size`` is that of all processes together.
        nproc: processes on this machine.
        ip: address of the first machine, if there are several.
        port: port of the first machine, if there are several.
        world_size: processes on all machines; ``nproc`` if -1.
        group_offset: rank of this machine's first process.
        quiet: see :func:`run`.
        on_start: see :func:`run`; called in the first process: a function of a module, so that it can be pickled.

    Returns:
        the result of the first process, which is that of all.

    Raises:
        SettingError: for an unknown setting, one that cannot be used, or a model that RecBole cannot train like this.
        DataError: for data that cannot be used.
        ProcessError: if a process fails otherwise; none is left then.
    """
    world_size = nproc if world_size == -1 else world_size
    if nproc < 1 or group_offset < 0 or group_offset + nproc > world_size:
        raise SettingError(
            f"--nproc={nproc} --group_offset={group_offset} --world_size={world_size}: "
            "processes are counted from 1, and all of them are in world_size"
        )
    if world_size > nproc and (ip is None or port is None):
        raise SettingError(f"--world_size={world_size} with --nproc={nproc} needs --ip and --port of the first machine")
    config = make_config(model, dataset, config_files, settings)  # errors show before processes start
    _check_distributed(config)
    group = {"nproc": nproc, "world_size": world_size, "offset": group_offset}
    address = f"tcp://{ip}:{port}" if world_size > nproc else None
    arguments = (model, dataset, config_files, settings, group, address, quiet, on_start)
    return launch(_run_process, arguments, nproc)


def _check_distributed(config: Config) -> None:
    """Refuse what RecBole cannot do in several processes."""
    alone = f"run {config['model']} in a single process, without --nproc"
    if config["MODEL_TYPE"] in (ModelType.TRADITIONAL, ModelType.DECISIONTREE):
        raise SettingError(f"{config['model']} is not trained by gradients, which is all that processes share: {alone}")
    if issubclass(get_trainer(config["MODEL_TYPE"], config["model"]), PretrainTrainer):
        raise SettingError(f"RecBole's pretraining writes one file from every process: {alone}")
    for name in ("save_dataset", "save_dataloaders", "dataloaders_save_path"):
        if config[name]:
            raise SettingError(f"{name}: RecBole reads and writes the file from every process at once: leave it out")


def _run_process(
    rank: int,
    rendezvous: str,
    model: str,
    dataset: str,
    config_files: Sequence[str | Path],
    settings: Mapping[str, Any] | None,
    group: Mapping[str, int],
    address: str | None,
    quiet: bool,
    on_start: Callable[[Prepared], None] | None,
) -> Result:
    """Run as one of the processes of :func:`run_distributed`."""
    warnings.simplefilter("ignore", Warning if rank else UnknownSettingWarning)  # shown by the first, or the parent
    if quiet:
        ignore_deprecations()
    if address is None:
        stay_on_this_machine()
    return run(
        model,
        dataset,
        config_files,
        {**(settings or {}), **group, "local_rank": rank, "init_method": address or rendezvous},
        quiet=quiet,
        on_start=on_start,
    )
