"""``slifmr study``: ablation, robustness, refresh interval, sensitivity, cold items, and your own."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import click
import yaml

from recbole_slifmr.cli.live import run_live
from recbole_slifmr.cli.options import FREE_SETTINGS, RUNS_OPTIONS, split_names, with_options
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import parse_settings


@click.command(name="study", context_settings=FREE_SETTINGS)
@click.argument("name")
@with_options(
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--models", "-m", default=None, help="Names with commas between them, instead of the study's."),
    click.option("--kinds", default=None, help="robustness: kinds of noise, with commas."),
    click.option("--levels", default=None, help="robustness: shares from 0 to 1, with commas."),
    click.option("--write_data", "--write-data", is_flag=True, help="robustness: keep the noisy data as atomic files."),
    click.option("--intervals", default=None, help="interval: epochs between refreshes, adaptive or off, with commas."),
    click.option("--vary", multiple=True, help="sensitivity: SETTING=VALUE,VALUE; may be given several times."),
    click.option("--out", default=None, help="Folder of the outputs; finished runs stay.  [NAME-DATASET]"),
    *RUNS_OPTIONS,
)
@click.pass_context
def study(context: click.Context, name: str, dataset: str, config_files: str, **options: Any) -> None:
    """Run a study: slifmr study ablation --dataset=ml-100k --seeds=2 --epochs=3.

    NAME is ablation, robustness, interval, sensitivity, coldstart or a YAML file of your own (docs/studies.md). Any
    setting for all variants is given as --name=value.
    """
    from recbole_slifmr.study.outputs import run_study, write_data
    from recbole_slifmr.study.plan import make_study

    warnings.simplefilter("error", UnknownSettingWarning)
    changes: dict[str, Any] = {"vary": _parse_vary(options.pop("vary"))}
    changes |= {entry: _values(options.pop(entry)) for entry in ("models", "kinds", "levels", "intervals")}
    changes = {entry: value for entry, value in changes.items() if value}
    running = {entry: options.pop(entry) for entry in ("jobs", "address", "reuse")}
    keep_data = options.pop("write_data")
    plan = make_study(
        name, dataset, changes, config_files=config_files.split(), settings=parse_settings(context.args), **options
    )
    if keep_data:
        for folder in write_data(plan):
            click.echo(f"data: {folder}")
    run_live(plan, partial(run_study, plan, **running))


def _values(text: str | None) -> list[Any] | None:
    """Read names and numbers with commas between them."""
    return None if text is None else [yaml.safe_load(value) for value in split_names(text)]


def _parse_vary(texts: tuple[str, ...]) -> dict[str, list[Any]]:
    vary: dict[str, list[Any]] = {}
    for text in texts:
        setting, equals, values = text.partition("=")
        if not equals or not values:
            raise SettingError(f"--vary reads SETTING=VALUE,VALUE, not '{text}'")
        if setting in vary:
            raise SettingError(f"--vary {setting} is given twice")
        vary[setting] = _values(values) or []
    return vary
