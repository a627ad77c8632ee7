"""Make the comparisons of models anew: tune every model with the same budget, then score it on test.

python results/make.py --data_path=DATA                     # everything; days on two cores
python results/make.py --data_path=DATA --sets=lastfm-lightkg --models=CEASE,LightKG,SLIFMR --trials=12 --seeds=5

Each model of a set is searched from its defaults with the same number of trials, epochs and patience, on the validation
split (closed forms: as many points of their grid). Then all models are scored on test with the settings found. What is
finished is kept: call it again to go on. Settings go to ``results/SET/tuned``, tables to ``results/SET/benchmark``, or
with ``--models`` to ``results/SET/benchmark-of-some``. Ablation, robustness and interval have commands of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLOSED_FORMS = ("EASE", "CEASE", "AddEASE", "L3AE")
INTERACTIONS = ("ItemKNN", "SLIMElastic", "LightGCN", "XSimGCL", "SGL", "NCL")
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
TEST_MASK = {"amazon-baby": "train"}  # as its published figures; else training and validation items


def commands(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the searches and the comparison of each set that are asked for."""
    for name in arguments.sets.split(","):
        folder = HERE / name
        chosen = [model for model in SETS[name] if not arguments.models or model in arguments.models.split(",")]
        if not chosen:
            continue
        common = [f"--dataset={name}", f"--data_path={arguments.data_path}", f"--stopping_step={arguments.patience}"]
        common += [f"--test_mask={TEST_MASK.get(name, 'train_valid')}"]
        for model in chosen:
            out = folder / "tuned" / model
            if not (out / "best.yaml").is_file():
                resume = ["--resume"] if any(out.glob("*")) else []
                budget = [
                    f"--trials={arguments.trials}",
                    f"--epochs={arguments.epochs}",
                    "--scheduler=none",
                    "--jobs=1",
                ]
                yield ["tune", f"--model={model}", *common, *budget, "--seeds=0", f"--out={out}", *resume]
        table = "benchmark" if len(chosen) == len(SETS[name]) else "benchmark-of-some"
        scores = [f"--models={','.join(chosen)}", f"--params={folder / 'tuned'}", f"--seeds={arguments.seeds}"]
        yield ["benchmark", *common, *scores, f"--epochs={arguments.epochs}", f"--out={folder / table}"]


def main() -> int:
    """Run the commands one after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="Folder of the data sets.")
    parser.add_argument("--sets", default=",".join(SETS), help="Names with commas between them. [all]")
    parser.add_argument("--models", help="Names with commas between them. [all that fit the set]")
    parser.add_argument("--trials", type=int, default=12, help="Points that each model tries. [12]")
    parser.add_argument("--epochs", type=int, default=200, help="At most. [200]")
    parser.add_argument("--patience", type=int, default=10, help="Validations without a gain. [10]")
    parser.add_argument("--seeds", type=int, default=5, help="Of each model, on test. [5]")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands only.")
    arguments = parser.parse_args()
    unknown = set(arguments.sets.split(",")) - set(SETS)
    if unknown:
        parser.error(f"--sets: {', '.join(sorted(unknown))} is none of {', '.join(SETS)}")
    known = {model for models in SETS.values() for model in models}
    wrong = set((arguments.models or "").split(",")) - known - {""}
    if wrong:
        parser.error(f"--models: {', '.join(sorted(wrong))} is none of {', '.join(sorted(known))}")
    for command in commands(arguments):
        print("slifmr", *command, flush=True)
        program = [sys.executable, "-c", "from recbole_slifmr.cli import main; main()", *command]
        if not arguments.dry_run and (status := subprocess.run(program).returncode):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
