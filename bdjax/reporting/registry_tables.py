"""The tables of docs/: attacks, defenses, datasets and quick presets from the registries, results from committed runs.

Installed plugins are in none of them.

    python -m bdjax.reporting.registry_tables docs

rewrites every block between `<!-- table: NAME -->` and `<!-- end of table -->`, each at the start of a line. NAME is a key of
`TABLES`, or "attack/cifar10 #1": table 1 of docs/results/attack/cifar10/table.md. A test checks that all are up to date.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bdjax.attacks.contract import Attack
from bdjax.attacks.registry import ATTACKS
from bdjax.datasets import DATASETS, FORMS
from bdjax.defenses.contract import Defense
from bdjax.defenses.registry import DEFENSES
from bdjax.metrics import ABBREVIATIONS, DEFINITIONS
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.presets import QUICK

_BLOCK = re.compile(
    r"(?P<begin>^<!-- table: (?P<name>[^\n]+?) -->\n).*?(?P<end>^<!-- end of table -->)", re.DOTALL | re.MULTILINE
)
_COMMITTED = re.compile(r"(?P<run>[\w-]+/[\w-]+) #(?P<number>[1-9]\d*)")


def attacks_table(attacks: Mapping[str, Attack] = ATTACKS.own) -> Table:
    """One row for each attack: its name, what its attacker controls and needs, its rates and label rules, its paper."""
    header = ("name", "title", "controls", "also needs", "poison rate", "label rules", "paper")
    return Table("", header, tuple(_attack_row(attack) for attack in attacks.values()))


def attack_settings_table(attacks: Mapping[str, Attack] = ATTACKS.own) -> Table:
    """One row for each attack: the paper's settings, and what changes for kinds of images and for data like a named set."""
    rows = (
        (_code(attack.name), _settings(attack.settings), _changes(attack.per_dataset)) for attack in attacks.values()
    )
    return Table("", ("name", "settings, the paper's where it gives them", "changed to"), tuple(rows))


def defenses_table(defenses: Mapping[str, Defense] = DEFENSES.own) -> Table:
    """One row for each defense: its name, its stage, what it needs, whether it detects poisoned rows, its paper."""
    header = ("name", "title", "stage", "needs", "detects rows", "paper")
    return Table("", header, tuple(_defense_row(defense) for defense in defenses.values()))


def defense_settings_table(defenses: Mapping[str, Defense] = DEFENSES.own) -> Table:
    """One row for each defense: the paper's settings, and what presets and data like a named set change."""
    rows = (
        (_code(defense.name), _settings(defense.settings), _changes(defense.changes)) for defense in defenses.values()
    )
    return Table("", ("name", "settings, the paper's where it gives them", "changed to"), tuple(rows))


def datasets_table() -> Table:
    """One row for each named dataset, with the facts that defaults depend on."""
    rows = (
        (_code(name), "yes" if source.traits.flips else "no", _code(source.traits.like) if source.traits.like else None)
        for name, source in DATASETS.own.items()
    )
    return Table("", ("name", "a mirrored image keeps its class", "quick runs are sized as for"), tuple(rows))


def forms_table() -> Table:
    """One row for each form of a user's own data."""
    rows = ((form.about, form.classes, form.copy) for form in FORMS.values())
    return Table("", ("a path that holds", "classes", "an audit leaves of the rows that are not flagged"), tuple(rows))


def quick_table(workflow: str) -> Table:
    """One row for each dataset that the `quick` preset has settings for.

    Args:
        workflow: a key of `bdjax.run.presets.QUICK`.
    """
    rows = ((_code(dataset), _fields(fields)) for dataset, fields in QUICK[workflow].items())
    return Table("", ("dataset", "what `quick` sets"), tuple(rows))


def definitions_table() -> Table:
    """One row for each number and word of tables, `results.json` and verdicts."""
    short = {name: text for text, name in ABBREVIATIONS.items()}
    rows = ((short.get(name, name.replace("_", " ")), _code(name), text) for name, text in DEFINITIONS.items())
    return Table("", ("in tables", "in `results.json`", "meaning"), tuple(rows))


TABLES: Mapping[str, Callable[[], Table]] = {
    "attacks": attacks_table,
    "attack settings": attack_settings_table,
    "defenses": defenses_table,
    "defense settings": defense_settings_table,
    "datasets": datasets_table,
    "forms": forms_table,
    "definitions": definitions_table,
    **{f"quick {workflow}": lambda workflow=workflow: quick_table(workflow) for workflow in QUICK},
}
"""Name of a block -> the table that stands in it."""


def fill_blocks(text: str, results: pathlib.Path) -> str:
    """A page with every block made anew.

    Args:
        text: Markdown with blocks or without.
        results: the folder of the committed runs, docs/results.

    Raises:
        KeyError: a block's name is neither a key of `TABLES` nor a table of a committed run.
    """

    def fill(block: re.Match[str]) -> str:
        committed = _COMMITTED.fullmatch(block["name"])
        if committed:
            table = committed_table(results / committed["run"] / "table.md", int(committed["number"]))
        else:
            table = _compact(TABLES[block["name"]]())
        return f"{block['begin']}\n{table}\n{block['end']}"

    return _BLOCK.sub(fill, text)


def committed_table(path: pathlib.Path, number: int) -> str:
    """One table of a run's table.md, without its title and notes.

    Args:
        path: the file.
        number: 1 for the first.

    Raises:
        KeyError: the file has fewer.
    """
    found = re.findall(r"(?:^\|.*\n)+", path.read_text("utf-8"), re.MULTILINE)
    if number > len(found):
        raise KeyError(f"{path} has {len(found)} tables, and not {number}")
    return found[number - 1]


def block_names(text: str) -> list[str]:
    """The names of a page's blocks."""
    return [block["name"] for block in _BLOCK.finditer(text)]


def _compact(table: Table) -> str:
    """The table in Markdown without padding: cells of many settings would make every row as wide."""
    return re.sub(r" {2,}(?=\|)", " ", re.sub(r"-{4,}", "---", to_markdown(table)))


def _attack_row(attack: Attack) -> tuple[str | None, ...]:
    settings = attack.settings
    cover = f" + {100 * settings.cover_rate:g} % cover" if settings.cover_rate else ""
    return (
        _code(attack.name),
        attack.title,
        attack.threat,
        ", ".join(attack.needs) or None,
        f"{100 * settings.poison_rate:g} %{cover}",
        ", ".join(map(_code, attack.label_rules)),
        attack.paper,
    )


def _defense_row(defense: Defense) -> tuple[str, ...]:
    needs = ", ".join(defense.needs)
    return _code(defense.name), defense.title, defense.stage, needs, "yes" if defense.detect else "no", defense.paper


def _settings(settings: Any) -> str | None:
    return _fields({field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}) or None


def _fields(fields: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in fields.items()}
    return ", ".join(_code(f"{name}={value}") for name, value in shown.items())


def _changes(changes: Mapping[str, Mapping[str, Any]]) -> str | None:
    return "; ".join(f"**{name}**: {_fields(fields)}" for name, fields in changes.items()) or None


def _code(text: str) -> str:
    return f"`{text}`"


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the blocks of all pages in a folder."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    for page in sorted(page for page in pathlib.Path(folder).rglob("*.md") if page.name != "table.md"):
        text = page.read_text("utf-8")
        filled = fill_blocks(text, pathlib.Path(folder) / "results")
        if filled != text:
            page.write_text(filled, "utf-8")
            print(f"rewrote {page}")


if __name__ == "__main__":
    main()
