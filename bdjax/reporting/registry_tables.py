"""The tables of attacks, defenses, datasets and quick presets in docs/, made from the registries.

    python -m bdjax.reporting.registry_tables docs

rewrites every block of docs/*.md between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is a key of `TABLES`.
A test compares the blocks with the registries.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bdjax.attacks.contract import Attack
from bdjax.attacks.registry import ATTACKS
from bdjax.datasets import DATASETS
from bdjax.defenses.contract import Defense
from bdjax.defenses.registry import DEFENSES
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.presets import QUICK

_BLOCK = re.compile(r"(?P<begin><!-- table: (?P<name>[\w ]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)


def attacks_table(attacks: Mapping[str, Attack] = ATTACKS) -> Table:
    """One row for each attack: its name, what its attacker controls and needs, its rates and label rules, its paper."""
    header = ("name", "title", "controls", "also needs", "poison rate", "label rules", "paper")
    return Table("", header, tuple(_attack_row(attack) for attack in attacks.values()))


def attack_settings_table(attacks: Mapping[str, Attack] = ATTACKS) -> Table:
    """One row for each attack: the paper's settings, and what changes for kinds of images and for data like a named set."""
    rows = (
        (_code(attack.name), _settings(attack.settings), _changes(attack.per_dataset)) for attack in attacks.values()
    )
    return Table("", ("name", "settings, the paper's where it gives them", "changed to"), tuple(rows))


def defenses_table(defenses: Mapping[str, Defense] = DEFENSES) -> Table:
    """One row for each defense: its name, its stage, what it needs, whether it detects poisoned rows, its paper."""
    header = ("name", "title", "stage", "needs", "detects rows", "paper")
    return Table("", header, tuple(_defense_row(defense) for defense in defenses.values()))


def defense_settings_table(defenses: Mapping[str, Defense] = DEFENSES) -> Table:
    """One row for each defense: the paper's settings, and what presets and data like a named set change."""
    rows = (
        (_code(defense.name), _settings(defense.settings), _changes(defense.changes)) for defense in defenses.values()
    )
    return Table("", ("name", "settings, the paper's where it gives them", "changed to"), tuple(rows))


def datasets_table() -> Table:
    """One row for each named dataset, with the facts that defaults depend on."""
    rows = (
        (_code(name), "yes" if source.traits.flips else "no", _code(source.traits.like) if source.traits.like else None)
        for name, source in DATASETS.items()
    )
    return Table("", ("name", "a mirrored image keeps its class", "quick runs are sized as for"), tuple(rows))


def quick_table(workflow: str) -> Table:
    """One row for each dataset that the `quick` preset has settings for.

    Args:
        workflow: a key of `bdjax.run.presets.QUICK`.
    """
    rows = ((_code(dataset), _fields(fields)) for dataset, fields in QUICK[workflow].items())
    return Table("", ("dataset", "what `quick` sets"), tuple(rows))


TABLES: Mapping[str, Callable[[], Table]] = {
    "attacks": attacks_table,
    "attack settings": attack_settings_table,
    "defenses": defenses_table,
    "defense settings": defense_settings_table,
    "datasets": datasets_table,
    **{f"quick {workflow}": lambda workflow=workflow: quick_table(workflow) for workflow in QUICK},
}
"""Name of a block -> the table that stands in it."""


def fill_blocks(text: str) -> str:
    """A page with every block made anew.

    Args:
        text: Markdown with blocks or without.

    Raises:
        KeyError: a block's name is not in `TABLES`.
    """
    return _BLOCK.sub(lambda block: f"{block['begin']}\n{_compact(TABLES[block['name']]())}\n{block['end']}", text)


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
    for page in sorted(pathlib.Path(folder).rglob("*.md")):
        text = page.read_text("utf-8")
        filled = fill_blocks(text)
        if filled != text:
            page.write_text(filled, "utf-8")
            print(f"rewrote {page}")


if __name__ == "__main__":
    main()
