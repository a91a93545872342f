"""The command gate: flags, lines, exit status."""

import json

import pytest

from bdjax.commands import gate
from bdjax.errors import InputError
from bdjax.reporting.evidence import verdict as verdicts


@pytest.fixture
def path(tmp_path):
    entries = [
        verdicts.metric("asr", "LfD on BadNets", 0.04, method="lfd", attack="badnets", control=0.01, rows=323),
        verdicts.metric("cda", "LfD on BadNets", 0.95, method="lfd", attack="badnets", rows=359),
        verdicts.metric("asr", "ABL on user data", None, method="abl", role="other", why="its trigger is unknown"),
    ]
    document = {
        "schema": verdicts.NAME,
        "schema_version": verdicts.VERSION,
        "verdict": {"word": "removed"},
        "metrics": entries,
    }
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("flags", "status", "lines"),
    [
        (["--max-asr=0.05"], 0, ["pass    --max-asr=0.05: asr of LfD on BadNets is 0.04 (control 0.01, 323 rows)"]),
        (["--max-asr=0.03"], 3, ["fail    --max-asr=0.03: asr of LfD on BadNets is 0.04 (control 0.01, 323 rows)"]),
        (
            ["--max-asr=1", "--method=abl"],
            4,
            [
                "unknown --max-asr=1: asr of ABL on user data is unknown (its trigger is unknown); an unknown number never "
                "passes"
            ],
        ),
        (
            ["--max-asr=0.05", "--min-cda=0.96", "--require-verdict=removed,removed at a cost"],
            3,
            [
                "pass    --max-asr=0.05: asr of LfD on BadNets is 0.04 (control 0.01, 323 rows)",
                "fail    --min-cda=0.96: cda of LfD on BadNets is 0.95 (control unknown, 359 rows)",
                "pass    --require-verdict=removed,removed at a cost: the verdict is removed",
            ],
        ),
    ],
)
def test_a_line_for_each_rule_and_a_status(path, capsys, flags, status, lines):
    assert gate.main([str(path), *flags]) == status
    assert capsys.readouterr().out.splitlines() == lines
    assert gate.main([*flags, f"--verdict={path}"]) == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no verdict.json; give its path"),
        (["nowhere.json", "--max-asr=0.1"], "nowhere.json: cannot be read"),
        (["nowhere.json", "--max-asr=2"], "--max-asr 2.0 is not"),
        (["nowhere.json", "--max-asr=high"], "--max-asr 'high' is not a number"),
        (["nowhere.json", "--max-ars=0.1"], "there is no flag '--max-ars'; did you mean --max-asr?"),
        (["/", "--max-asr=0.1"], "is not a regular file"),
    ],
)
def test_input_that_cannot_be_used_is_one_line(arguments, message):
    with pytest.raises(InputError) as error:
        gate.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("program", "usage"), [("bdjax", "bdjax gate"), ("experiments/gate.py", "gate.py")])
def test_help_names_the_command_and_has_a_group_of_rules(program, usage, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [program])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        gate.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and f"usage: {usage} VERDICT.json " in text
    assert "limits options" in text and "other options" not in text
