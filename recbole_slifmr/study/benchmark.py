"""Side-by-side benchmarking: several models, several seeds, one data set, one protocol, one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from recbole_slifmr.errors import ReportError, SettingError, one_line
from recbole_slifmr.files import hold, replace_file, write_csv, write_json
from recbole_slifmr.host.own import name_of
from recbole_slifmr.host.settings import make_config, read_settings
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.study import plots, statistics, tables
from recbole_slifmr.study.manifest import manifest
from recbole_slifmr.study.runs import METRICS, TOPK, check, collect, prepare_processes, run_all, take_over
from recbole_slifmr.study.store import DataStore
from recbole_slifmr.study.task import Task, read_progress, read_result
from recbole_slifmr.training.evaluation import ITEM_GROUPS, MASKS, USER_GROUPS

FIRST_SEED = 2020
TABLE = ("recall@20", "ndcg@20", "recall@10", "ndcg@10")
PROTOCOL = (
    "epochs",
    "stopping_step",
    "eval_step",
    "valid_metric",
)  # the same for all, whatever a file of parameters says
# what a variant cannot have of its own
COMMON = ("model", "dataset", "seed", "threads", "checkpoint_dir", "show_progress", "state")
DETERMINISTIC = ("EASE", "ItemKNN", "Pop")  # models of RecBole that draw nothing
ONE_SEED = (
    "one seed: stars and intervals are over the users of one training run and say nothing of how training varies."
)


class Variant(NamedTuple):
    """A row of the table: a model with settings of its own.

    Attributes:
        model: name of the model.
        settings: settings that win over all others.
        label: what the tables call it; the model if empty.
        factors: what sets it apart, for the tables of a study.
    """

    model: str
    settings: Mapping[str, Any] = {}
    label: str = ""
    factors: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark compares, and where its files go.

    Attributes:
        tasks: one per variant and seed.
        out: folder of the outputs.
        reference: the title of the tasks that the others are tested against; empty for none.
        tuned: ``{model: number of trials, or None where unknown}`` for the models with parameters from a file.
        test_mask: see :func:`~recbole_slifmr.training.experiment.run`.
        name: of the study; a benchmark is one, too.
    """

    tasks: tuple[Task, ...]
    out: Path
    reference: str
    tuned: Mapping[str, int | None]
    test_mask: str
    name: str = "benchmark"

    @property
    def titles(self) -> list[str]:
        """What the rows of the table are called, in the order asked for."""
        return list(dict.fromkeys(task.title for task in self.tasks))

    @property
    def first_tasks(self) -> dict[str, Task]:
        """One task of every title."""
        return {task.title: task for task in reversed(self.tasks)}


def benchmark(
    dataset: str, models: Sequence[str], jobs: int = 1, address: str | None = None, **options: Any
) -> pd.DataFrame:
    """Run a benchmark, or what is left of it, and write its outputs.

    Args:
        dataset: name of the data set's folder under ``data_path``.
        models: names, or ``package.module:Class`` of the user's own; ``SLIFMR``, or else the first, is the reference of
            the tests of significance.
        jobs: runs at a time; more than one runs them as Ray tasks.
        address: of a running Ray cluster that sees the same files.
        options: ``out`` and the arguments of :func:`make_tasks`.

    Returns:
        one row per finished run.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained.
    """
    return run_plan(make_plan(dataset, models, **options), jobs, address)


def run_plan(
    plan: Benchmark,
    jobs: int = 1,
    address: str | None = None,
    on_tick: Callable[[Mapping[str, str]], None] = lambda states: None,
    reuse: Iterable[str | Path] = (),
    write: Callable[[Any, pd.DataFrame, pd.DataFrame, Mapping[str, str]], None] | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> pd.DataFrame:
    """Run what is left of a plan and write its outputs; see :func:`benchmark`.

    Early stopping and the choice of the epoch use the validation split only; each run scores the test split once.

    Args:
        plan: what to run.
        jobs: runs at a time.
        address: of a running Ray cluster.
        on_tick: called about twice a second with the state of each run by name.
        reuse: other output folders, whose runs of just the same settings are taken over.
        write: writes the outputs from plan, runs, users and states; :func:`write_outputs` if None.
        tell: called with what is being done before and after the runs, in a few words.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained; also if a benchmark or
            study is running in the folder.
        ReportError: if an output cannot be written; ``results.csv`` and the runs are kept.
    """
    if jobs == 1 and not address and not all(map(read_result, plan.tasks)):
        prepare_processes()
    data = DataStore()
    made = manifest(plan, check(plan.tasks, data, tell))
    plan.out.mkdir(parents=True, exist_ok=True)
    with hold(plan.out):
        take_over(plan.tasks, map(Path, reuse))
        tell("")
        states = run_all(plan.tasks, jobs, address, on_tick, data)
        tell("writing tables and plots")
        runs, users = collect(plan.tasks)
        if len(runs):
            (plan.out / "manifest.json").unlink(missing_ok=True)  # it goes with the old tables, and comes with the new
            write_csv(plan.out / "results.csv", runs)
            try:
                (write or write_outputs)(plan, runs, users, states)
                write_json(plan.out / "manifest.json", made)
            except Exception as error:
                raise ReportError(
                    f"the runs are done and in {plan.out / 'results.csv'}, but a table or plot cannot be written: "
                    f"{one_line(error)}"
                ) from error
    return runs


def make_plan(dataset: str, models: Sequence[str], out: str | Path = "benchmark", **options: Any) -> Benchmark:
    """Return what a benchmark will run. A random split is the same for all seeds.

    Args:
        dataset: name of the data set's folder under ``data_path``.
        models: names, or ``package.module:Class`` of the user's own; ``SLIFMR``, or else the first, is the reference of
            the tests of significance.
        out: folder of the outputs; finished runs found there are not run again.
        options: the other arguments of :func:`make_tasks`.

    Raises:
        SettingError: for anything that cannot be used.
    """
    refuse_twice(models)
    tasks, tuned = make_tasks(dataset, [Variant(model) for model in models], Path(out), **options)
    reference = "SLIFMR" if "SLIFMR" in models else name_of(models[0])
    return Benchmark(tasks, Path(out), reference, tuned, tasks[0].test_mask)


def refuse_twice(models: Sequence[str]) -> None:
    """Refuse two models that the tables would call the same."""
    if len({name_of(str(model)) for model in models}) < len(models):
        raise SettingError("a model is named twice")


def make_tasks(
    dataset: str,
    variants: Sequence[Variant],
    out: Path,
    seeds: int = 5,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    params: str | Path | None = None,
    test_mask: str = "train_valid",
    threads: int = 1,
) -> tuple[tuple[Task, ...], dict[str, int | None]]:
    """Return a task per variant and seed; those that come to the same run share its folder.

    Args:
        dataset: name of the data set's folder under ``data_path``.
        variants: what to run.
        out: folder of the outputs.
        seeds: number of training seeds; a model that draws nothing is run once.
        config_files: YAML files of settings for all models; ``seed`` among the settings is that of the split and the
            first of the runs.
        settings: settings for all models, which win over the files.
        params: folder with ``MODEL.yaml`` or ``MODEL/best.yaml``, which win over ``config_files``.
        test_mask: ``train_valid`` or ``train``, see :func:`~recbole_slifmr.training.experiment.run`.
        threads: CPU threads per run; results are the same for the same number only.

    Returns:
        the tasks, and ``{model: number of trials, or None where unknown}`` for the models with parameters from a file.

    Raises:
        SettingError: for anything that cannot be used.
    """
    if not variants:
        raise SettingError("no models to run: name at least one")
    if seeds < 1 or threads < 1:
        raise SettingError("seeds and threads must be at least 1")
    if test_mask not in MASKS:
        raise SettingError(f"test_mask must be one of {', '.join(MASKS)}, not '{test_mask}'")
    for variant in variants:
        for name in COMMON:
            if name in variant.settings:
                title = variant.label or variant.model
                raise SettingError(f"{title}: {name} is the same for all variants: leave it out")
    files = [Path(file).resolve() for file in config_files]
    given = given_settings(files, settings)
    if "model" in (settings or {}):
        raise SettingError("model is no setting for all models: name them with --models")
    first_seed = given.get("seed", FIRST_SEED)
    if type(first_seed) is not int or first_seed < 0:
        raise SettingError(f"seed must be a whole number from 0, not {first_seed!r}")
    common = {"metrics": METRICS, "topk": TOPK, **(settings or {})}
    common.pop("seed", None)  # each run has one of its own
    if "data_path" in common:
        common["data_path"] = str(Path(common["data_path"]).resolve())
    own_files: dict[str, tuple[str, ...]] = {}
    shared: dict[str, dict[str, Any]] = {}
    tuned: dict[str, int | None] = {}
    for model in dict.fromkeys(variant.model for variant in variants):
        file = _params_file(params, model)
        shared[model] = common
        if file is not None:
            base = make_config(model, dataset, files, common)
            shared[model] = {**common, **{name: base[name] for name in PROTOCOL}}
            read_settings(file)
            trials = re.search(r"^# trials: (\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            tuned[model] = int(trials[1]) if trials else None
        own_files[model] = tuple(str(path) for path in (*files, *([file] if file else [])))
    folders = _Folders(out / "runs")
    tasks = []
    for variant in variants:
        model = variant.model
        values = {**shared[model], **_changed(variant, dataset, own_files[model], shared[model])}
        try:
            once = is_deterministic(make_config(model, dataset, list(own_files[model]), values))
        except SettingError:  # what is wrong with a model is told of all models at once, before the runs start
            once = True
        for seed in range(first_seed, first_seed + (1 if once else seeds)):
            task = Task(
                model, seed, dataset, out, own_files[model], values, first_seed, test_mask, threads, variant.label
            )
            tasks.append(replace(task, folder=folders.of(task)))
    return tuple(tasks), tuned


def given_settings(config_files: Sequence[str | Path], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is asked of all models: the files' settings, and over them those given by name.

    Raises:
        SettingError: for a file that holds no settings, or a ``data_path`` that is none.
    """
    given: dict[str, Any] = {}
    for file in config_files:
        given |= read_settings(file)
    given |= settings or {}
    if not isinstance(given.get("data_path", ""), (str, Path)):
        raise SettingError(f"data_path must name a folder, not {given['data_path']!r}")
    return given


def is_deterministic(config: Any) -> bool:
    """Return whether a run is the same with every seed: the model draws nothing, nor does noise in its inputs."""
    by_name = config["model"] in DETERMINISTIC
    return getattr(config.model_class, "deterministic", by_name) and not config["noise"]


class _Folders:
    """A folder for each run, named after its first title; titles that come to the same file name do not share one."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent.resolve()
        self.by_key: dict[str, Path] = {}
        self.taken: set[str] = set()

    def of(self, task: Task) -> Path:
        """Return the folder of a run, the same for equal runs."""
        key = task.settings_key()
        if key not in self.by_key:
            name = re.sub(r"[^\w.=+-]+", "_", task.name)
            if name.casefold() in self.taken:
                name = f"{name}-{key[:8]}"
            self.taken.add(name.casefold())
            self.by_key[key] = self.parent / name
        return self.by_key[key]


def _changed(
    variant: Variant, dataset: str, files: Sequence[str | Path], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the variant's settings that are not what they would be anyway: equal runs have equal settings."""
    if not variant.settings:
        return {}
    base = make_config(variant.model, dataset, files, settings)
    return {name: value for name, value in variant.settings.items() if name not in base or base[name] != value}


def _params_file(params: str | Path | None, model: str) -> Path | None:
    if params is None:
        return None
    if not Path(params).is_dir():
        raise SettingError(f"params: there is no folder {params}")
    name = name_of(model)
    candidates = (Path(params) / f"{name}.yaml", Path(params) / name / "best.yaml")
    return next((path.resolve() for path in candidates if path.is_file()), None)


# -- outputs ------------------------------------------------------------------------------------------------------


def caption(plan: Benchmark, runs: pd.DataFrame, states: Mapping[str, str]) -> str:
    """Say how the numbers of the table came about."""
    configs = [make_config(**task.arguments) for task in plan.first_tasks.values()]
    config = configs[0]
    n_seeds = runs.groupby("model")["seed"].nunique()
    seeds = str(n_seeds.iloc[0]) if n_seeds.nunique() == 1 else ", ".join(f"{m}: {n}" for m, n in n_seeds.items())
    split = "fixed split" if config["benchmark_filename"] else f"split {config['eval_args']['split']}"
    items = "training and validation" if plan.test_mask == "train_valid" else "training"
    if any(each["cold_items"] for each in configs):
        split += f", {_span((each['cold_items'] for each in configs), '.0%')} of the items held out of training"
    epochs, patience = (_span(each[name] for each in configs) for name in ("epochs", "stopping_step"))
    metrics = " or ".join(dict.fromkeys(each["valid_metric"] for each in configs))
    parts = [
        f"{plan.tasks[0].dataset}, {split}, test scores, "
        + (ONE_SEED if seeds == "1" else f"mean ± standard deviation over {seeds} seeds."),
        f"All models: at most {epochs} epochs, patience {patience} evaluations, best epoch by validation {metrics}; "
        f"items of {items} are not ranked at test time. {_span(runs['n_users'])} users with test items are scored.",
        origin_of_settings(plan),
        f"* p < 0.05, ** p < 0.01 against {plan.reference} (two-sided Wilcoxon signed-rank test over users, Holm)."
        if plan.reference
        else "",
        *_failures(plan, states),
    ]
    return " ".join(filter(None, parts))


def _span(values: Iterable[Any], form: str = "") -> str:
    """Return the smallest and the largest of the values, or the one that there is."""
    values = sorted(values)
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys((values[0], values[-1])))


def _failures(plan: Benchmark, states: Mapping[str, str]) -> list[str]:
    """Return a sentence per row of the table that lacks runs, and why."""
    sentences = []
    for title in plan.titles:
        tasks = [task for task in plan.tasks if task.title == title]
        failed = [task for task in tasks if states[task.name] != "done"]
        if failed:
            seeds = "" if len(failed) == len(tasks) else f" with seed {', '.join(str(task.seed) for task in failed)}"
            sentences.append(f"{title} failed{seeds}: {states[failed[0].name].rstrip('.')}.")
    return sentences


def origin_of_settings(plan: Benchmark) -> str:
    """Say for each model whether it has its defaults, and how many runs its settings come from."""
    models = dict.fromkeys(task.model for task in plan.tasks)
    return f"Settings: {', '.join(f'{name_of(model)} ({_origin(plan, model)})' for model in models)}."


def _origin(plan: Benchmark, model: str) -> str:
    file = PROPERTIES / "model" / f"{model}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    runs = re.search(r"^# runs behind the defaults: (.+)", text, re.MULTILINE)
    defaults = f"defaults from {runs[1]}" if runs else "defaults"
    if model not in plan.tuned:
        return defaults
    trials = f"{plan.tuned[model]} trials" if plan.tuned[model] else "trials unknown"
    return f"{defaults}, then {trials}" if runs else trials


def shown_metrics(runs: pd.DataFrame) -> list[str]:
    """Return the metrics of the tables."""
    present = [metric for metric in TABLE if f"test_{metric}" in runs]
    others = [name.removeprefix("test_") for name in runs if name.startswith("test_") and "/" not in name]
    return present or others[:4]


def write_outputs(plan: Benchmark, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    """Write what :func:`write_runs` does, ``table.md``, ``table.tex`` and ``bars.png``."""
    metrics = shown_metrics(runs)
    summary = statistics.summarise(runs)
    comparisons = write_runs(plan, runs, users, states)
    titles = [title for title in plan.titles if title in summary.index]
    table = tables.cells(summary, metrics, comparisons)
    text = caption(plan, runs, states)
    (plan.out / "table.md").write_text(tables.markdown(titles, metrics, table, text), encoding="utf-8")
    (plan.out / "table.tex").write_text(tables.latex(titles, metrics, table, text), encoding="utf-8")
    plots.plot_bars(plan.out / "bars.png", summary, metrics)


def write_runs(
    plan: Benchmark, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]
) -> dict[str, list[statistics.Comparison]]:
    """Write ``results.json``, ``per_user.parquet`` and ``curves.png``.

    Returns:
        the comparisons with the reference by metric.
    """
    summary = statistics.summarise(runs)
    metrics = [metric for metric in shown_metrics(runs) if metric in users]  # some, as ItemCoverage, have no users
    comparisons: dict[str, list[statistics.Comparison]] = {}
    gains = {}
    if plan.reference in summary.index and len(summary) > 1:
        comparisons = {metric: statistics.compare(users, metric, plan.reference) for metric in metrics}
        gains = {metric: statistics.improvement(users, metric, plan.reference) for metric in metrics}
    out = plan.out
    replace_file(out / "per_user.parquet", lambda part: users.to_parquet(part, index=False))
    means = {
        title: {name: {"mean": row[name, "mean"], "std": row[name, "std"]} for name in summary.columns.levels[0]}
        for title, row in summary.iterrows()
    }
    write_json(
        out / "results.json",
        {
            "caption": caption(plan, runs, states),
            "models": means,
            "comparisons": {metric: [c._asdict() for c in found] for metric, found in comparisons.items()},
            "improvement": {metric: gain._asdict() for metric, gain in gains.items()},
            "item_groups": ITEM_GROUPS,
            "user_groups": USER_GROUPS,
            "states": dict(states),
        },
    )
    curves = {
        task.name: [point[:3] for point in read_progress(task)] for task in plan.tasks if states[task.name] == "done"
    }
    valid_metric = make_config(**plan.tasks[0].arguments)["valid_metric"].lower()
    plots.plot_curves(out / "curves.png", curves, valid_metric)
    return comparisons
