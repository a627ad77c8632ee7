"""``slifmr inspect``: what to know of a data set before training on it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from recbole_slifmr.cli.options import FREE_SETTINGS, with_options
from recbole_slifmr.data.survey import survey
from recbole_slifmr.data.survey_report import Section, remarks, sections, write_survey
from recbole_slifmr.errors import UnknownSettingWarning
from recbole_slifmr.host.settings import make_config, parse_settings
from recbole_slifmr.model import MODELS
from recbole_slifmr.training.experiment import load_data


@click.command(name="inspect", context_settings=FREE_SETTINGS)
@click.argument("dataset")
@with_options(
    click.option(
        "--model", type=click.Choice(MODELS), default="SLIFMR", show_default=True, help="Whose data and memory."
    ),
    click.option("--out", default="inspect", show_default=True, help="Folder of the outputs."),
    click.option("--config_files", "--config-files", default="", help="YAML files of settings, separated by spaces."),
)
@click.pass_context
def inspect_command(context: click.Context, dataset: str, model: str, out: str, config_files: str) -> None:
    """Look at a data set before training on it: slifmr inspect ml-100k.

    Sizes, degrees, gaps, repeated rows, leaks between the splits, whether features and knowledge graph say anything of
    taste, memory. Any setting of the data is given as --name=value.
    """
    warnings.simplefilter("error", UnknownSettingWarning)
    settings = {"state": "ERROR", **parse_settings(context.args)}
    config = make_config(model, dataset, config_files.split(), settings)
    loaders = load_data(config)
    splits = {name: loader._dataset for name, loader in zip(("train", "valid", "test"), loaders, strict=True)}
    found = survey(config, splits)
    write_survey(found, splits["train"], Path(out))
    console = Console()
    for section in sections(found):
        console.print(_table(section))
    for line in remarks(found):
        console.print(f"- {line}", highlight=False)
    console.print(f"outputs: {os.path.relpath(out)}", highlight=False, soft_wrap=True)


def _table(section: Section) -> Table:
    table = Table(title=section.title, title_justify="left")
    for i, column in enumerate(section.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in section.rows:
        table.add_row(*row)
    return table
