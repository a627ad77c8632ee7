"""The pages: links, commands and code in them work, and the site builds."""

import glob
import re
import shlex
import warnings
from pathlib import Path

import pytest
from sphinx.cmd.build import build_main

from recbole_slifmr.cli import main, slifmr
from recbole_slifmr.cli.train import run_recbole
from recbole_slifmr.data.noise import read_noise
from recbole_slifmr.errors import UnknownSettingWarning
from recbole_slifmr.host.settings import make_config, parse_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "results/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = {"slifmr": slifmr, "run_recbole": run_recbole}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, *languages):
    return [text for language, text in FENCE.findall(read(page)) if language in languages]


def command_lines(page):
    """Return the lines of the page's shell blocks: no prompts, comments, placeholders or continuations."""
    for block in blocks(page, "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s|;", line.partition(" #")[0].removeprefix("$ ")):
                if part.split() and part.split()[0] in PROGRAMS:
                    yield shlex.split(part.replace(" ... ", " "))


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_too_long(page):
    prose = [line for line in read(page).splitlines() if not line.startswith("|") and "](" not in line]
    assert [line for line in prose if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page):
    folder = (ROOT / page).parent
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (folder / target).resolve() if target else ROOT / page
        found = path.exists() and path.is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors(path.relative_to(ROOT).as_posix())):
            broken.append(link)
    assert broken == []


def find_command(words):
    """Return the command that the words name, and the rest of the words."""
    command, rest = PROGRAMS[words[0]], words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no such command: {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def check_command(words):
    """Assert that the command exists, and that its options are its own or settings that somebody reads."""
    command, rest = find_command(words)
    context = command.make_context("slifmr", list(rest), resilient_parsing=True)
    own = {option for parameter in command.params for option in parameter.opts}
    options = {word.partition("=")[0] for word in rest if word.startswith("-")}
    if not context.ignore_unknown_options:
        assert options <= own | {"--help", "-h"}, " ".join(words)
        return
    settings = {name: value for name, value in parse_settings(context.args).items() if name != "data_path"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownSettingWarning)
        named = context.params.get("model")  # of `slifmr extract` one of sentence-transformers; or the reader's own
        model = "SLIFMR" if named in (None, "MODEL") or set("/:") & set(named) else named
        config = make_config(model, "toy", settings=settings)
    read_noise(config)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_exists(page):
    for words in command_lines(page):
        check_command(words)


@pytest.mark.parametrize(
    "line", ["slifmr trains --dataset=toy", "slifmr train --epoch_s=3", "slifmr report --output=x", "slifmr convert x"]
)
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises((AssertionError, UnknownSettingWarning)):
        check_command(line.split())


def test_the_readme_is_short_and_the_index_lists_every_page():
    assert len(read("README.md").splitlines()) <= 110
    listed = set(re.findall(r"^([\w./-]+)$", read("docs/index.md"), re.MULTILINE))
    assert {Path(page).stem for page in PAGES if page.startswith("docs/")} - listed == {"index"}


def test_the_python_of_the_readme_runs(capsys):
    """The README's five lines, with one epoch."""
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 5 and '"epochs": 10' in code
    exec(code.replace('"epochs": 10', '"epochs": 1'), {})
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/own_model.md"])
def test_the_tutorials_run(page):
    """Their commands and Python run one after the other, as a reader would run them; some blocks are files."""
    for language, code in FENCE.findall(read(page)):
        if file := re.match(r"# (\w+\.(?:py|yaml))\n", code):
            Path(file[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(code, {})
        for line in code.splitlines() if language == "bash" else ():
            words = [name for word in shlex.split(line) for name in (glob.glob(word) if "*" in word else [word])]
            assert words[0] == "slifmr", line
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            assert stop.value.code == 0, line


def test_the_site_builds_without_warnings_and_loads_nothing_from_a_network(tmp_path):
    site = tmp_path / "site"
    assert build_main(["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), str(ROOT), str(site)]) == 0
    for name in slifmr.commands:
        assert f"slifmr {name}" in (site / "docs" / "commands" / f"{name}.html").read_text(encoding="utf-8")
    assert "knn_graph" in (site / "docs/api/recbole_slifmr.nn.html").read_text(encoding="utf-8")
    page = (site / "docs/method.html").read_text(encoding="utf-8")
    assert "<math" in page
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+', page) == []


def test_the_page_of_faults_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "trust.md").read_text().splitlines() if line.startswith("| ")]
    named = [match for row in rows for match in re.findall(r"`tests/(\w+\.py)::(\w+)", row)]
    assert len(named) >= 40
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"
