"""The commands: parsing and printing, nothing else. Each module holds one or two."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

import click

from recbole_slifmr import __version__
from recbole_slifmr.cli import (
    benchmark,
    convert,
    doctor,
    export,
    extract,
    inspect,
    recommend,
    report,
    serve,
    study,
    train,
    tune,
)
from recbole_slifmr.errors import (
    DataError,
    ProcessError,
    ReportError,
    SettingError,
    StorageError,
    UnknownSettingWarning,
)

FAILED, BAD_INPUT = 1, 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slifmr")
def slifmr() -> None:
    """Recommend from interactions, a knowledge graph and item features together."""


for command in (
    train.train,
    benchmark.benchmark_command,
    study.study,
    tune.tune_command,
    report.report_command,
    recommend.recommend,
    export.export_command,
    serve.serve,
    convert.convert,
    extract.extract_command,
    inspect.inspect_command,
    doctor.doctor_command,
):
    slifmr.add_command(command)


def _invoke(command: click.Command, name: str, arguments: Sequence[str] | None) -> int:
    """Run a command; return its exit status, with one line on stderr 2 for bad input and 1 for what else fails."""
    try:
        command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except (DataError, SettingError, UnknownSettingWarning) as error:
        click.echo(f"error: {error}", err=True)
        return BAD_INPUT
    except (ProcessError, ReportError, StorageError) as error:
        click.echo("\n".join(getattr(error, "__notes__", ())), err=True, nl=False)
        click.echo(f"error: {error}", err=True)
        return FAILED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OSError as error:
        _drop_output()
        if not isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            click.echo(f"error: {_describe(error)}", err=True)
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    return 0


def _describe(error: OSError) -> str:
    """Return what the system refused, where, and what to look at."""
    where = "a file or the output" if error.filename is None else os.fsdecode(error.filename)
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{where} cannot be written or read: {reason}; check the path, its rights and the room on its disk"


def _drop_output() -> None:
    """Where the output cannot be written, let go of the rest: Python would try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # of a stand-in without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``slifmr``."""
    sys.exit(_invoke(slifmr, "slifmr", arguments))


def run_recbole(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``run_recbole``."""
    sys.exit(_invoke(train.run_recbole, "run_recbole", arguments))


def run_script(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``run_recbole_slifmr.py``: a command of ``slifmr`` if one is named, else ``run_recbole``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        main(arguments)
    run_recbole(arguments)
