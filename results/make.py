"""Make the comparisons of models anew: tune every model with the same budget, then score it on test.

python results/make.py --data_path=DATA                     # everything; days on two cores
python results/make.py --data_path=DATA --sets=lastfm-lightkg --models=CEASE,LightKG,SLIFMR --trials=12 --seeds=5

Each model of a set is searched from its defaults with the same number of trials, epochs and patience, on the validation
split; closed forms go through their grid one setting after the other. The settings found go to
``properties/dataset/SET``, and all models are then scored on test with them; the table goes to
``results/SET/benchmark``, or with ``--models`` to ``results/SET/benchmark-of-some``. What is finished is kept under
``results/out``, each search with its command: call it again to go on; with another budget it stops there. Ablation,
robustness and interval have commands of their own.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CLOSED_FORMS = ("EASE", "CEASE", "AddEASE", "L3AE")
INTERACTIONS = ("ItemKNN", "IALS", "SLIMElastic", "LightGCN", "XSimGCL", "SGL", "NCL")
GRAPH = ("KGAT", "KGIN", "MCCLK", "LightKG", "AdaKG")
MULTIMODAL = ("LATTICE", "FREEDOM", "BM3", "MGCN", "SMORE", "MSCA")
OURS = ("SLIFMRPaper", "SLIFMR")
SETS = {
    "amazon-toys": (*CLOSED_FORMS, *INTERACTIONS, *GRAPH, *MULTIMODAL, *OURS),
    "amazon-book-s": (*CLOSED_FORMS, *INTERACTIONS, *GRAPH, *MULTIMODAL, *OURS),
    "amazon-baby": (*CLOSED_FORMS, *INTERACTIONS, *MULTIMODAL, *OURS),
    "lastfm-lightkg": (*CLOSED_FORMS, *INTERACTIONS, *GRAPH, *MULTIMODAL, *OURS),
    "lastfm-mm": (*CLOSED_FORMS, *INTERACTIONS, *GRAPH, *MULTIMODAL, *OURS),
    "ml-100k-mm": (*CLOSED_FORMS, *INTERACTIONS, *GRAPH, *MULTIMODAL, *OURS),
}
TEST_MASK = {"amazon-baby": "train", "ml-100k-mm": "train"}  # as published; else training and validation items


def commands(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the searches and the comparison of each set that are asked for, each as Python's arguments."""
    slifmr = ["-c", "from recbole_slifmr.cli import main; main()"]
    for name in arguments.sets.split(","):
        out, published = HERE / "out" / name, ROOT / "properties" / "dataset" / name
        chosen = [model for model in SETS[name] if not arguments.models or model in arguments.models.split(",")]
        if not chosen:
            continue
        data = [f"--dataset={name}", f"--data_path={arguments.data_path.resolve()}", f"--threads={arguments.threads}"]
        pace = [f"--stopping_step={arguments.patience}", f"--epochs={arguments.epochs}"]
        mask = [f"--test_mask={TEST_MASK[name]}"] if name in TEST_MASK else []
        for model in chosen:
            best = out / "tuned" / model / "best.yaml"
            if model in CLOSED_FORMS:
                command = ["-m", "benchmarks.closed_forms", f"--models={model}", *data, f"--out={best.parent.parent}"]
            else:
                budget = [f"--trials={arguments.trials}", "--scheduler=none", f"--jobs={arguments.jobs}", "--seeds=0"]
                resume = ["--resume"] if any(best.parent.glob("*")) else []
                command = [*slifmr, "tune", f"--model={model}", *data, *pace, *budget, f"--out={best.parent}", *resume]
            if not arguments.dry_run:
                keep_command(best.parent / "command", command)
            if not best.is_file():
                yield command
            if best.is_file() and not arguments.dry_run:
                publish(best, published / f"{model}.yaml", command)
        table = "benchmark" if len(chosen) == len(SETS[name]) else "benchmark-of-some"
        scores = [f"--models={','.join(chosen)}", f"--params={published}", f"--seeds={arguments.seeds}"]
        scores += [f"--jobs={arguments.jobs}", f"--out={out / table}"]
        yield [*slifmr, "benchmark", *data, *pace, *mask, *scores]
        if not arguments.dry_run:
            copy_table(out / table, HERE / name / table, arguments.data_path.resolve())


class OtherCommandError(ValueError):
    """What is there was found by another command than the one asked for."""


def keep_command(file: Path, command: list[str]) -> None:
    """Write down beside what a search finds which command it was; refuse a folder of another one.

    Raises:
        OtherCommandError: if the folder holds what another command has found or begun, or does not say which.
    """
    asked = said(command)
    if not any(file.parent.glob("*")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(asked, encoding="utf-8")
        return
    found = file.read_text(encoding="utf-8") if file.is_file() else "an unknown command"
    if found != asked:
        raise OtherCommandError(f"{file.parent} is of '{found}', not of '{asked}': ask for that, or remove the folder")


def publish(best: Path, file: Path, command: list[str]) -> None:
    """Write what a search has found, the searched settings alone, to a file that says where they come from."""
    text = best.read_text(encoding="utf-8")
    space = yaml.safe_load((ROOT / "properties" / "tune" / file.name).read_text(encoding="utf-8"))
    found = {name: value for name, value in yaml.safe_load(text).items() if name in space}
    lines = [f"# {file.stem} on {file.parent.name}, chosen on validation by", f"# {said(command)}"]
    lines += [line for line in text.splitlines() if line.startswith(("# trials", "# validation"))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n" + yaml.safe_dump(found, sort_keys=False), encoding="utf-8")


def said(command: list[str]) -> str:
    """Return how one would type it, without the folders of this machine."""
    shown = ["python", *command] if command[0] == "-m" else ["slifmr", *command[2:]]
    return shlex.join(re.sub("^(--data_path|--out)=.*", r"\1=DIR", part) for part in shown if part != "--resume")


def copy_table(made: Path, table: Path, data: Path) -> None:
    """Copy what a reader of the results needs from the outputs of a comparison, without the folders of this machine."""
    table.mkdir(parents=True, exist_ok=True)
    for name in ("table.md", "results.csv", "bars.png", "curves.png"):
        if (made / name).is_file():
            shutil.copyfile(made / name, table / name)
    manifest = (made / "manifest.json").read_text(encoding="utf-8")
    manifest = manifest.replace(str(data), "DATA").replace(f"{ROOT}/", "").replace('"-c benchmark', '"slifmr benchmark')
    (table / "manifest.json").write_text(manifest, encoding="utf-8")


def main() -> int:
    """Run the commands one after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="Folder of the data sets.")
    parser.add_argument("--sets", default=",".join(SETS), help="Names with commas between them. [all]")
    parser.add_argument("--models", help="Names with commas between them. [all that fit the set]")
    parser.add_argument("--trials", type=int, default=12, help="Points that each model tries. [12]")
    parser.add_argument("--epochs", type=int, default=200, help="At most. [200]")
    parser.add_argument("--patience", type=int, default=10, help="Validations without a gain. [10]")
    parser.add_argument("--seeds", type=int, default=5, help="Of each model, on test. [5]")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time. [1]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run. [1]")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands only.")
    arguments = parser.parse_args()
    unknown = set(arguments.sets.split(",")) - set(SETS)
    if unknown:
        parser.error(f"--sets: {', '.join(sorted(unknown))} is none of {', '.join(SETS)}")
    known = {model for models in SETS.values() for model in models}
    wrong = set((arguments.models or "").split(",")) - known - {""}
    if wrong:
        parser.error(f"--models: {', '.join(sorted(wrong))} is none of {', '.join(sorted(known))}")
    try:
        for command in commands(arguments):
            print(shlex.join(["python", *command]), flush=True)
            if not arguments.dry_run and (status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode):
                return status
    except OtherCommandError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
