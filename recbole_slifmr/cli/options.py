"""What the commands share: settings given as ``--name=value``, lists with commas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from recbole_slifmr.errors import SettingError
from recbole_slifmr.training.evaluation import MASKS

RUNS_OPTIONS = (  # of the commands that run many models or variants side by side
    click.option("--seeds", default=5, show_default=True, help="Training seeds of each."),
    click.option("--reuse", multiple=True, help="Outputs of a benchmark or study whose equal runs are taken over."),
    click.option("--config_files", "--config-files", default="", help="YAML files of settings for all."),
    click.option("--params", default=None, help="Folder with MODEL.yaml or MODEL/best.yaml: tuned settings."),
    click.option("--test_mask", "--test-mask", default=MASKS[0], show_default=True, type=click.Choice(MASKS),
                 help="Items never ranked at test time."),
    click.option("--threads", default=1, show_default=True, help="CPU threads per run."),
    click.option("--jobs", default=1, show_default=True, help="Runs at a time, as Ray tasks if more than one."),
    click.option("--address", default=None, help="Running Ray cluster that sees the same files."),
)  # fmt: skip
FREE_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}


def with_options(*options: Any) -> Any:
    """Return a decorator that gives a command several options at once."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def split_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_files(texts: Sequence[str], option: str) -> dict[str, Path]:
    """Read ``name=file`` pairs with commas between them.

    Raises:
        SettingError: naming the option and the pair.
    """
    files: dict[str, Path] = {}
    for pair in ",".join(texts).split(",") if texts else []:
        name, equals, file = pair.partition("=")
        if not (name and equals and file) or name in files:
            raise SettingError(f"{option} reads name=file, each name once, with commas between: not '{pair}'")
        files[name] = Path(file)
    return files
