"""Gate: compare the verdict.json of a run with limits, as a step of continuous integration does.

A line for each rule says why it passes or not. An unknown number never passes. The exit status is 0 if every rule passes, 3 if
one fails, 4 if one cannot be decided, 2 for input that cannot be used.
"""

import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdjax.errors import InputError
from bdjax.run import command_line
from bdjax.run.checks import check_path, check_ranges
from bdjax.settings import Share


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The rules."""

    verdict: pathlib.Path | None = None
    """the file, as --evidence has written it; also without the flag, as the first word"""
    max_asr: Share | None = None
    """the highest attack success rate of what the run is about, under any of its attacks; means over seeds"""
    min_cda: Share | None = None
    """the lowest clean data accuracy"""
    require_verdict: str = ""
    """the verdicts that pass, separated by commas: "nothing found", or "removed,removed at a cost" """
    method: str = ""
    """a method or model of the run, instead of those that it is about"""


def rules_of(config: GateConfig) -> dict[str, Any]:
    """The rules as `bdjax.reporting.evidence.gate.decide` takes them."""
    words = [word.strip() for word in config.require_verdict.split(",") if word.strip()]
    return {"max_asr": config.max_asr, "min_cda": config.min_cda, "words": words, "method": config.method}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the flags, print a line for each rule, and return the exit status.

    Raises:
        InputError: a flag or the file cannot be used.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--verdict={arguments[0]}"
    texts = {"prog": f"{command_line.program('gate')} VERDICT.json", "description": __doc__.splitlines()[0]}
    config = command_line.parse(GateConfig, {}, arguments, about_processes="", **texts)
    if config.verdict is None:
        raise InputError("there is no verdict.json; give its path, such as runs/vbd/photos-quick/evidence/verdict.json")
    check_ranges(config)
    check_path("--verdict", config.verdict)
    from bdjax.reporting.evidence import gate  # takes seconds, which --help need not wait for

    lines = gate.decide(gate.read(config.verdict.expanduser()), **rules_of(config))
    for line in lines:
        print(f"{line.outcome:<7} {line.text}")
    return gate.status_of(lines)
