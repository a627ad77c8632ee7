"""``slifmr benchmark``: several models side by side."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import click

from recbole_slifmr.cli.live import run_live
from recbole_slifmr.cli.options import FREE_SETTINGS, RUNS_OPTIONS, split_names, with_options
from recbole_slifmr.errors import UnknownSettingWarning
from recbole_slifmr.host.settings import parse_settings


@click.command(name="benchmark", context_settings=FREE_SETTINGS)
@with_options(
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--models", "-m", required=True,
                 help="Names with commas between them: SLIFMR,LightGCN,KGAT; module:Class of a model of your own."),
    click.option("--out", default="benchmark", show_default=True, help="Folder of the outputs; finished runs stay."),
    *RUNS_OPTIONS,
)  # fmt: skip
@click.pass_context
def benchmark_command(context: click.Context, dataset: str, models: str, config_files: str, **options: Any) -> None:
    """Compare models: slifmr benchmark --dataset=ml-100k --models=SLIFMR,LightGCN --seeds=2 --epochs=5.

    Any setting for all models is given as --name=value.
    """
    from recbole_slifmr.study.benchmark import make_plan, run_plan

    warnings.simplefilter("error", UnknownSettingWarning)
    running = {name: options.pop(name) for name in ("jobs", "address", "reuse")}
    plan = make_plan(
        dataset,
        split_names(models),
        config_files=config_files.split(),
        settings=parse_settings(context.args),
        **options,
    )
    run_live(plan, partial(run_plan, plan, **running))
