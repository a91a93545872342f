"""README.md and docs/: links resolve, commands are ones that the experiments accept, generated tables are up to date."""

import ast
import configparser
import importlib
import importlib.util
import itertools
import json
import pathlib
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import bdjax
from bdjax.attacks.label_rules import LABEL_RULES
from bdjax.attacks.registry import ATTACKS
from bdjax.commands import COMMANDS as TABLE
from bdjax.commands import audit_data, gate
from bdjax.commands import grid as grid_command
from bdjax.datasets import DATASETS, load_suspect
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.evaluation.variants import read_attack, read_defense
from bdjax.models import MODELS
from bdjax.reporting.evidence.gate import decide
from bdjax.reporting.evidence.verdict import metric
from bdjax.reporting.evidence.writing import SUMS
from bdjax.reporting.registry_tables import TABLES, block_names, fill_blocks, main
from bdjax.run import command_line, grid_file, presets
from bdjax.run.config import adapted_to
from bdjax.run.experiment import read_flags
from bdjax.training import process_flags
from bdjax.types import Dataset
from bdjax.workflows import attack as attack_workflow
from bdjax.workflows import base, detection, grid, suspect_models
from bdjax.workflows import ta_kd as ta_kd_workflow

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if page.name != "table.md")]
REPORT_PICTURE = DOCS / "report.png"
MOST_README_BYTES = 8192
EXPERIMENTS = ("ta_kd", "lfd", "abm", "vbd", "robust_kd", "attack", "audit_data", "audit_model")
IMAGE_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "tiny_imagenet": (64, 64, 3)}
NUM_ROWS = 10_000
NUM_CLASSES = {"gtsrb": 43, "cifar100": 100, "tiny_imagenet": 200, "flowers17": 17}

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")
INLINE_CODE = re.compile(r"`([^`\n]+)`")


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The fenced blocks in a language."""
    return [body for _, tag, body in FENCE.findall(page.read_text("utf-8")) if tag == language]


def prose(page: pathlib.Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def links(page: pathlib.Path) -> list[str]:
    """The targets of links and images that are not on the web."""
    found = [first or second for first, second in LINK.findall(INLINE_CODE.sub("", prose(page)))]
    found += [first or second for first, second in LINK.findall(prose(page))]
    return [target for target in dict.fromkeys(found) if not re.match(r"https?:|mailto:", target)]


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    counts: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(slug if not counts[slug] else f"{slug}-{counts[slug]}")
        counts[slug] += 1
    return found


# ---- Size, links, structure ------------------------------------------------------------------------------------------


def test_the_readme_fits_one_screen():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}: no such heading"


def test_the_readmes_picture_is_there():
    assert "docs/report.png" in links(ROOT / "README.md")
    assert REPORT_PICTURE.read_bytes().startswith(b"\x89PNG")


def test_every_page_and_picture_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        if page.suffix == ".md":
            waiting += [
                (page.parent / target.partition("#")[0]).resolve() for target in links(page) if target[0] != "#"
            ]
    assert set(PAGES) <= reached, f"no link leads to {sorted(map(name_of, set(PAGES) - reached))}"
    index = (DOCS / "README.md").read_text()
    assert all(f"({page.name})" in index for page in DOCS.glob("*.md") if page.name != "README.md")


def test_the_readme_says_what_there_is():
    text = (ROOT / "README.md").read_text()
    assert f"{len(ATTACKS.own)} attacks" in text
    in_the_table = ("none", "lfd", "abm", "vbd", "robust_kd", "ta_kd_student")
    assert f"{len(DEFENSES.own) - len(in_the_table)} further defenses" in text and set(in_the_table) <= set(DEFENSES)


def test_the_readme_has_two_command_lines():
    """A fresh machine needs no other."""
    (install, test) = (line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines() if line)
    assert install.startswith("pip install -r requirements.txt && python experiments/ta_kd.py") and "pytest" in test


# ---- Commands --------------------------------------------------------------------------------------------------------


def commands(page: pathlib.Path) -> Iterator[str]:
    """The shell commands of a page: lines of its sh blocks, without comments, and complete commands within sentences."""
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n *", "", block).splitlines():
            yield from filter(None, (part.strip() for part in re.sub(r" +# .*", "", line).split("&&")))
    for code in INLINE_CODE.findall(prose(page)):
        if re.match(r"(python |pip install|\.ci/run$|bdjax [a-z][a-z-]+ )", code):
            yield code
        elif re.fullmatch(r"'\.\[[\w,]+\]'", code):
            yield f"pip install -e {code}"
        elif re.match(r"experiments/\w+\.py --", code):
            yield f"python {code}"


def test_the_pages_on_the_command_name_every_command():
    rows = re.findall(
        r"^\| `bdjax ([a-z-]+)` \| (?:`experiments/([a-z_]+)\.py`|–) \|", (DOCS / "runs.md").read_text(), re.M
    )
    assert sorted(rows) == sorted((name, command.module) for name, command in TABLE.items())
    assert "(docs/plugins.md)" in (ROOT / "README.md").read_text()


def words(command: str) -> list[str]:
    """The arguments that a shell makes of a command; what is within $(...) is run, which is an echo."""
    if "$(" in command:
        assert re.fullmatch(r"[^$]*\$\(echo [^()$;&<>]* \| tr ' ' ,\)[^$]*", command)
        done = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()
    return shlex.split(command)


EXAMPLES = re.compile(r"stripe|--attack=dot$|--defenses=fine_tuning,nad,clip$")
"""Parts that a page adds: the template of plugins, which tests/plugins installs, and the manual's attack and defense."""
COMMANDS = sorted(
    {(command, name_of(page)) for page in PAGES for command in commands(page) if not EXAMPLES.search(command)}
)
"""All but those with parts that a page adds."""


def test_commands_are_found():
    assert len(COMMANDS) > 100 and {name for _, name in COMMANDS} >= {
        "README.md",
        "docs/runs.md",
        "docs/results/vbd.md",
    }


@pytest.mark.parametrize(("page", "part"), [("add_an_attack", "dot"), ("add_a_defense", "clip")])
def test_a_page_that_adds_a_part_tries_it(page, part):
    (command,) = blocks(DOCS / "manual" / f"{page}.md", "sh")
    assert EXAMPLES.search(command.strip()) and command.strip().endswith(part)
    assert f'name="{part}"' in (DOCS / "manual" / f"{page}.md").read_text()


def test_the_forms_of_data_are_named_where_an_audit_is_described():
    texts = [(DOCS / "manual" / "audit_your_data.md").read_text(), (ROOT / "README.md").read_text()]
    for text in (*texts, audit_data.__doc__, audit_data.EXAMPLE):
        assert all(
            form in text for form in (".npz", "parquet", "tar", "COCO", "list" if text == texts[1] else "metadata")
        )
    assert all("--copy-files" in text and "cleaned.npz" in text for text in (texts[0], audit_data.__doc__))


@pytest.mark.parametrize("command", dict.fromkeys(command for command, _ in COMMANDS), ids=str)
def test_a_command_is_one_that_works(command):
    arguments = words(command)
    if arguments[0] == "srun":
        arguments = arguments[1:]
    match arguments:
        case ["pip", "install", *what]:
            check_install(what)
        case ["python", "-m", "pytest", *options]:
            check_pytest(options)
        case ["python", "-m", module, *_]:
            extras = setup_cfg()["options.extras_require"].values()  # of which the tests' environment has only some
            assert importlib.util.find_spec(module) or any(re.search(rf"^{module}\b", names, re.M) for names in extras)
        case ["python", script, "--help"] if script.startswith("experiments/"):
            assert (ROOT / script).is_file()
        case ["python", "experiments/grid.py", *arguments]:
            check_grid(arguments)
        case ["python", script, *flags] if script.startswith("experiments/"):
            check_experiment(pathlib.Path(script).stem, flags)
        case ["bdjax", "grid", *arguments]:
            check_grid(arguments)
        case ["bdjax", name, *flags]:
            check_experiment(TABLE[name].module, flags)
        case ["cd", folder]:
            assert folder.startswith("runs/")
        case ["sha256sum", "-c", name]:
            assert name == SUMS
        case ["ruff", *options]:
            assert options in (["check", "."], ["format", "--check", "."])
        case [".ci/run"]:
            assert (ROOT / ".ci" / "run").exists()
        case _:
            pytest.fail(f"{command}: no test knows such a command")


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def check_install(what: list[str]) -> None:
    if what[0] == "-r":
        assert (ROOT / what[1]).is_file() and len(what) == 2
        return
    assert what[0] == "-e" and len(what) == 2
    extras = re.fullmatch(r"\.\[([\w,]+)\]", what[1])[1].split(",")
    assert set(extras) <= set(setup_cfg()["options.extras_require"])


def test_pyarrow_is_one_that_reads_numpy_2():
    lines = "\n".join(setup_cfg()["options.extras_require"].values()).splitlines()
    assert {line for line in lines if line.startswith("pyarrow")} == {"pyarrow >= 17"}


def check_pytest(options: list[str]) -> None:
    if options:
        assert len(options) == 2 and options[0] == "-m"
        markers = [line.partition(":")[0] for line in setup_cfg()["tool:pytest"]["markers"].split("\n") if line]
        assert options[1] in markers


@cache
def some_rows(dataset: str) -> Dataset:
    """Rows of the shape and the classes of a dataset, all black: what attacks' settings are checked against."""
    shape, classes = IMAGE_SHAPES.get(dataset, (32, 32, 3)), NUM_CLASSES.get(dataset, 10)
    labels = np.arange(NUM_ROWS, dtype=np.int32) % classes
    if dataset == "gtsrb":  # its classes differ in size
        labels[labels < 4] = 4
        labels[: int(0.155 * NUM_ROWS)] = np.repeat([0, 1, 2, 3], [50, 570, 570, 360])
    return Dataset(np.broadcast_to(np.uint8(0), (NUM_ROWS, *shape)), labels, classes, "rows", "a test")


def defined_in(name: str) -> ModuleType:
    """The module with the presets and studies of a script."""
    return importlib.import_module(f"experiments.{name}" if name == "bench_ensemble" else f"bdjax.commands.{name}")


def check_experiment(name: str, flags: list[str]) -> None:
    """Read the flags and check them as a run does, before any data is read."""
    assert (ROOT / "experiments" / f"{name}.py").is_file()
    script = defined_in(name)
    _, flags = process_flags.take_flags(flags)
    if name == "bench_ensemble":
        script.check(command_line.parse(script.preset, {"preset": None}, flags))
        return
    if name == "gate":
        check_gate(flags)
        return
    config = read_flags(script.EXPERIMENT, "", flags)
    assert presets.is_registered(config.dataset) or config.dataset.endswith(("/", ".npz", ".parquet"))
    like = adapted_to(config)
    if name == "ta_kd":
        ta_kd_workflow.check(config)
        return
    if name == "audit_model":
        assert config.model
        script.check(config)
        return
    if name == "attack":
        attack_workflow.check(config)
        attack_workflow.make_plans(config, some_rows(config.dataset))
        return
    if name in ("vbd", "audit_data"):
        attacks, defenses = detection.settle(config, script.EXPERIMENT)
        detection.read_detectors(config, defenses)
    else:
        (suspect_models.check if name == "robust_kd" else base.check)(config, script.EXPERIMENT)
        attacks, defenses = base.attacks_and_defenses(config, script.EXPERIMENT)
        for text in defenses:
            read_defense(text, config.preset, like)
    gets = "model" if name == "robust_kd" else "training set"
    for text in attacks:
        check_attack(text, config.dataset, config.target, like, gets)


def check_grid(arguments: list[str]) -> None:
    names, flags = command_line.split_words(arguments)
    if names[0] == "collect":
        assert names[1:] and command_line.parse(grid_command.CollectConfig, {}, flags)
    else:
        assert len(names) == 1 and names[0].endswith(".toml") and command_line.parse(grid_command.GridConfig, {}, flags)


def check_gate(flags: list[str]) -> None:
    """A verdict that passes is in the place of the file."""
    assert flags[0].endswith("/evidence/verdict.json")
    config = command_line.parse(gate.GateConfig, {}, flags[1:])
    entries = [metric(name, "a run", 0.5, method=config.method) for name in ("asr", "cda")]
    decide({"verdict": {"word": "removed"}, "metrics": entries}, **gate.rules_of(config))


@cache
def check_attack(text: str, dataset: str, target: int, like: str | None, gets: str) -> None:
    """Many commands name the same attacks."""
    read_attack(text, some_rows(dataset), target, like=like, defender_gets=gets)


def test_a_flag_that_is_not_there_would_be_noticed():
    with pytest.raises(InputError, match="there is no flag"):
        check_experiment("lfd", ["--no-such-flag=1"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_sentences_are_flags(page):
    known = {"help", "coordinator", "processes", "process", "distributed", *gate.GateConfig.__dataclass_fields__}
    for name in (*EXPERIMENTS, "bench_ensemble"):
        script = defined_in(name)
        config = script.preset() if name == "bench_ensemble" else script.EXPERIMENT.default()
        known |= set(type(config).__dataclass_fields__)
    known |= set(grid_command.GridConfig.__dataclass_fields__) | set(grid_command.CollectConfig.__dataclass_fields__)
    for code in INLINE_CODE.findall(prose(page)):
        for flag in re.findall(r"(?:^| )--([a-z][\w-]*)", code):
            assert flag.replace("-", "_").removeprefix("no_") in known, (
                f"{name_of(page)}: --{flag} is a flag of no experiment"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_grids_are_ones_that_work(page, tmp_path):
    """Everything but what needs the rows of a dataset."""
    assert blocks(page, "toml") or page.name != "grid.md"
    for text in blocks(page, "toml"):
        (tmp_path / "grid.toml").write_text(text)
        file = grid_file.read(tmp_path / "grid.toml")
        experiments = grid_command.experiments()
        for number, block in enumerate(file.blocks):
            for name, dataset in itertools.product(block.experiments, block.datasets):
                fields, config = grid.read_config(file, number, experiments[name], dataset)
                attacks, defenses = grid.names_in(file, number, experiments[name], config)
                assert fields["dataset"] == config.dataset == dataset and attacks and defenses
                for text in attacks:
                    check_attack(text, dataset, config.target, adapted_to(config), "training set")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_compile(page):
    for code in blocks(page, "python"):
        compile(code, name_of(page), "exec")
    for text in blocks(page, "json"):
        json.loads(text)


def test_the_script_for_backdoorbenchs_images(tmp_path, monkeypatch):
    train, _ = bdjax.load("digits")
    images = 255 - train.images[[3, 40]]
    for index, image in zip((3, 40), images, strict=True):
        place = tmp_path / "bd_train_dataset" / str(train.labels[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{index}.png")
    np.savez(tmp_path / "rows.npz", index=[3, 40], label=[0, 0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bdjax, "load", lambda name: (train, None))
    (script,) = (code for code in blocks(DOCS / "backdoorbench.md", "python") if "torch" not in code)
    exec(compile(script, "backdoorbench.md", "exec"), {})
    found = load_suspect("suspect.npz")
    assert np.flatnonzero(found.is_poisoned).tolist() == [3, 40] and found.labels[[3, 40]].tolist() == [0, 0]
    np.testing.assert_array_equal(found.images[[3, 40]], images)
    np.testing.assert_array_equal(found.original_labels, train.labels)
    np.savez("rows.npz", index=[4], label=[0])
    (tmp_path / "bd_train_dataset" / str((train.labels[4] + 1) % 10)).mkdir(exist_ok=True)
    Image.fromarray(images[0][..., 0]).save(f"bd_train_dataset/{(train.labels[4] + 1) % 10}/4.png")
    with pytest.raises(SystemExit, match="the order of rows differs"):
        exec(compile(script, "backdoorbench.md", "exec"), {})


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if name not in ("ta_kd", "attack", "audit_data", "audit_model")]
)
def test_every_study_has_a_result_or_is_listed_as_never_run(name):
    studies = defined_in(name).EXPERIMENT.studies
    assert studies
    section = (DOCS / "not_yet_run.md").read_text() + (DOCS / "results" / f"{name}.md").read_text()
    assert not [study for study in studies if f"--study={study}" not in section and f"`{study}`" not in section]


# ---- Tables that follow the code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_tables_are_up_to_date(page):
    text = page.read_text("utf-8")
    assert fill_blocks(text, DOCS / "results") == text, "run: python -m bdjax.reporting.registry_tables docs"


def test_every_generated_table_stands_on_a_page_once():
    names = [name for page in PAGES for name in block_names(page.read_text("utf-8"))]
    of_registries = [name for name in names if "#" not in name]  # those of committed runs may stand on several pages
    assert sorted(of_registries) == sorted(TABLES)


def test_pages_are_rewritten_by_the_command(tmp_path, capsys):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("before\n\n<!-- table: datasets -->\nold\n<!-- end of table -->\n\nafter\n")
    other.write_text("nothing to fill\n")
    run = tmp_path / "results" / "attack" / "a-run"
    run.mkdir(parents=True)
    (run / "table.md").write_text("**Title**\n\n| a |\n| - |\n| 1 |\n\nnotes\n\n| b |\n| - |\n| 2 |\n")
    (tmp_path / "results" / "attack.md").write_text("<!-- table: attack/a-run #2 -->\n<!-- end of table -->\n")
    main([str(tmp_path)])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == list(DATASETS.own)
    filled = (tmp_path / "results" / "attack.md").read_text()
    assert filled == "<!-- table: attack/a-run #2 -->\n\n| b |\n| - |\n| 2 |\n\n<!-- end of table -->\n"
    assert capsys.readouterr().out.splitlines() == [f"rewrote {page}", f"rewrote {tmp_path}/results/attack.md"]
    for name in ("no such table", "attack/a-run #3"):
        with pytest.raises(KeyError):
            fill_blocks(f"<!-- table: {name} -->\n<!-- end of table -->\n", tmp_path / "results")


def names_in_table(page: str, heading: str) -> set[str]:
    """What stands in backticks in the first columns of the tables below a heading, to the next heading of its level."""
    section = (DOCS / page).read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in INLINE_CODE.findall(cell)}


def test_written_tables_name_all_there_is():
    assert names_in_table("data_and_models.md", "## Networks") == set(MODELS.own)
    assert names_in_table("data_and_models.md", "## Datasets") == set(DATASETS.own)
    assert names_in_table("attacks.md", "## Label rules") == set(LABEL_RULES)
    assert names_in_table("defenses.md", "## What each does") >= set(DEFENSES.own)
    families = (DOCS / "attacks.md").read_text().split("## Families\n")[1].split("\n## ")[0]
    places = {f"{tile}_all_to_all" for tile in ("white_square", "green_square", "white_grid", "color_grid")}
    assert set(INLINE_CODE.findall(families)) >= set(ATTACKS.own) - places


def equation_rows() -> list[tuple[list[str], list[str], str]]:
    """(files, functions, the last cell) of each row below "From equations to files"."""
    section = (DOCS / "design.md").read_text().split("## From equations to files\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [
        (INLINE_CODE.findall(file), INLINE_CODE.findall(function), function)
        for _, file, function in rows
        if "`" in file
    ]


@pytest.mark.parametrize(("files", "functions", "cell"), equation_rows(), ids=lambda value: str(value)[:60])
def test_the_map_of_equations_names_files_and_functions_that_are_there(files, functions, cell):
    if "studies" in cell:
        studies = defined_in(pathlib.Path(files[0]).stem).EXPERIMENT.studies
        assert set(functions) <= set(studies) and ("17 studies" not in cell or len(studies) == 17)
        return
    trees = [ast.parse((ROOT / file).read_text()) for file in files]
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(functions) <= defined


def test_other_files_that_pages_name_are_there():
    for page in PAGES:
        for code in INLINE_CODE.findall(prose(page)):
            if re.fullmatch(r"(bdjax|experiments|tests)/[\w/]+\.py", code) and "NAME" not in code:
                assert (ROOT / code).is_file(), f"{name_of(page)}: {code} is not there"


def test_nothing_lies_at_the_root_but_what_belongs_there():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode or not found.stdout:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in found.stdout.splitlines()} == {
        *(".ci", ".gitignore", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.cfg"),
        *("bdjax", "docs", "experiments", "tests"),
    }
