"""What the commands share: settings given as ``--name=value``, lists with commas."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import click
import yaml

from recbole_slifmr.errors import SettingError
from recbole_slifmr.evaluation import MASKS

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


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--name=value`` and ``--name value`` pairs.

    A value is read as Python (``1e-3``, ``['a', 'b']``, ``None``), else as YAML (``{text: text.npy}``, ``true``), else
    as a string.

    Raises:
        SettingError: for anything else on the command line, or a setting given twice.
    """
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise SettingError(f"unexpected argument '{argument}': settings read --name=value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"'{argument}' has no value: settings read --name=value")
            value = rest.pop(0)
        if name in settings:
            raise SettingError(f"'--{name}' is given twice")
        settings[name] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, dict, list)) else text


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
