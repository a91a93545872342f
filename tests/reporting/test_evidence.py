"""The evidence of committed runs, without training anything: schemas, bytes, words, and what a gate makes of it."""

import copy
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from packageurl import PackageURL

from bdjax.commands import lfd as lfd_command
from bdjax.errors import InputError
from bdjax.metrics import DEFINITIONS
from bdjax.reporting import defenses, students
from bdjax.reporting import ta_kd as ta_kd_reporting
from bdjax.reporting.evidence import bom, gate, model_card, sarif, writing
from bdjax.reporting.evidence import verdict as verdicts
from bdjax.reporting.evidence.subject import Facts, Flagged, Subject
from bdjax.reporting.report import Verdict
from bdjax.run import clock
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset
from tests.fixtures import evidence

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"
RECORD = {"versions": {"bdjax": "0.1", "jax": "0.10.2", "python": "3.11.2", "flax": None}, "git_revision": "abc123"}
ROWS = Dataset(
    np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8, 1),
    np.array([0, 1, 2, 0, 1, 2], np.int32),
    3,
    "photos",
    "/data/photos (6 images)",
    ("cat", "dog", "#ten < 7"),
    files=("cat/1.png", "dog/a b%.png", "#ten < 7/ü:\udcff.png", "cat/2.png", "dog/2.png", "#ten < 7/2.png"),
)
FLAGS = np.array([False, True, True, False, False, True])


def stored(name: str) -> dict:
    return json.loads((RESULTS / name / "results.json").read_text())


def run_folder(path: pathlib.Path, results: dict) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results))
    return RunFolder(path, True, RECORD)


def write(path: pathlib.Path, results: dict, subject: Subject, experiment: str = "lfd") -> pathlib.Path:
    headline = results.get("verdict", {"level": "info", "headline": "What came out.", "text": "So much.\n\nAnd more."})
    return writing.write(
        run_folder(path, results),
        results,
        subject,
        Verdict(**headline),
        experiment=experiment,
        title=f"{experiment} on photos",
        command=f"python experiments/{experiment}.py --dataset=photos/",
        settings={"seed": 0, "dataset": "photos/"},
    )


def lfd_subject(results: dict) -> Subject:
    rows = {attack["attack"]: 323 for attack in results["attacks"] if attack["parts"]}
    flagged = (Flagged("LfD", ROWS, FLAGS, None),)
    return Subject(
        {"training data": ROWS}, flagged, rows, {}, ("lfd",), lambda *names: defenses.word_of(results, *names)
    )


@pytest.fixture(scope="module")
def lfd(tmp_path_factory) -> tuple[dict, pathlib.Path]:
    results = stored("lfd/digits")
    return results, write(tmp_path_factory.mktemp("lfd"), results, lfd_subject(results))


def test_a_defense_has_every_number_with_its_control_and_its_rows(lfd):
    results, folder = lfd
    verdict = evidence.check(folder)
    asr = {(entry["method"], entry["attack"]): entry for entry in verdict["metrics"] if entry["metric"] == "asr"}
    for cell in results["cells"]:
        key = cell["method"], cell["attack"]
        if cell["attack"] == "none":  # a clean set has no trigger, so there is no ASR to know
            assert key not in asr
            continue
        assert asr[key]["value"] == cell["summary"]["asr"]["mean"] and asr[key]["rows"] == 323
        assert asr[key]["control"] == cell["summary"]["control_asr"]["mean"]
    roles = {entry["method"]: entry["role"] for entry in verdict["metrics"]}
    assert roles["none"] == "baseline" and roles["lfd"] == "subject" and "other" in roles.values()
    assert verdict["run"]["kind"] == "defenses" and verdict["exit_code"] == 0
    words = [entry["word"] for entry in verdict["outcomes"]]
    assert verdict["verdict"]["word"] == max(words, key=verdicts.DEFENSE_WORDS.index)
    assert verdict["definitions"]["asr"] == DEFINITIONS["asr"]
    assert verdict["thresholds"]["removed_asr"]["value"] == 0.1
    assert verdict["files"]["results.json"] == writing.sha256(folder.parent / "results.json")
    cda = next(entry for entry in verdict["metrics"] if entry["metric"] == "cda" and entry["attack"] != "none")
    clean = next(cell for cell in results["cells"] if (cell["attack"], cell["method"]) == ("none", cda["method"]))
    assert cda["control"] == clean["summary"]["cda"]["mean"] and cda["rows"] == results["test_rows"]


def test_flagged_files_are_locations_relative_to_the_data(lfd):
    _, folder = lfd
    (run,) = json.loads((folder / "findings.sarif").read_text())["runs"]
    rows = [result for result in run["results"] if result["ruleId"] == "flagged-row"]
    places = [result["locations"][0]["physicalLocation"]["artifactLocation"] for result in rows]
    assert [place["uri"] for place in places] == [
        "dog/a%20b%25.png",
        "%23ten%20%3C%207/%C3%BC%3A%FF.png",
        "%23ten%20%3C%207/2.png",
    ]
    assert {place["uriBaseId"] for place in places} == {"DATA"} <= set(run["originalUriBaseIds"])
    assert [result["properties"]["row"] for result in rows] == [1, 2, 5]
    assert "uri" not in run["originalUriBaseIds"]["DATA"]
    logical = rows[0]["locations"][0]["logicalLocations"][0]
    assert logical["fullyQualifiedName"] == "photos/class 1 (dog)/row 1"


def test_locations_are_the_same_wherever_the_data_is(lfd, tmp_path):
    results, folder = lfd
    moved = Flagged("LfD", dataclasses.replace(ROWS, source="/elsewhere/photos (6 images)"), FLAGS, None)
    other = write(tmp_path, results, lfd_subject(results)._replace(flagged=(moved,)))
    (ours,), (theirs,) = (json.loads((path / "findings.sarif").read_text())["runs"] for path in (folder, other))
    assert ours["results"] == theirs["results"]


def test_rows_without_files_are_logical_locations_only(tmp_path):
    results = stored("lfd/digits")
    subject = lfd_subject(results)
    scores = np.array([0, 0.5, 0.9, 0, 0, 0.7])
    bare = Flagged("LfD", dataclasses.replace(ROWS, files=()), FLAGS, scores)
    folder = write(tmp_path, results, subject._replace(flagged=(bare,)))
    evidence.check(folder)
    (run,) = json.loads((folder / "findings.sarif").read_text())["runs"]
    rows = [result for result in run["results"] if result["ruleId"] == "flagged-row"]
    assert [result["properties"]["row"] for result in rows] == [2, 5, 1], "the most suspicious first"
    assert all("physicalLocation" not in result["locations"][0] for result in rows)


def test_the_same_run_gives_the_same_bytes_but_for_the_time(lfd, tmp_path, monkeypatch):
    results, folder = lfd
    monkeypatch.setenv(clock.EPOCH, "1000000000")
    first, second = (write(tmp_path / name, results, lfd_subject(results)) for name in "ab")
    for name in (*evidence.FILES, "SHA256SUMS"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in evidence.FILES:
        ours, other = ((place / name).read_text() for place in (first, folder))
        assert "2001-09-09T01:46:40Z" in ours and ours != other
        assert re.sub(evidence.TIME, "", ours) == re.sub(evidence.TIME, "", other), name


def test_a_time_that_is_none_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(clock.EPOCH, "1700000000000")  # milliseconds
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH=1700000000000 is not a number of seconds since 1970"):
        lfd_command.main(["--evidence", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*evidence.FILES])
def test_a_flipped_byte_is_noticed(lfd, tmp_path, name):
    folder = write(tmp_path, lfd[0], lfd_subject(lfd[0]))
    assert evidence.sums_fit(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert not evidence.sums_fit(folder)


def test_the_schemas_refuse_what_they_should(lfd):
    _, folder = lfd
    verdict = json.loads((folder / "verdict.json").read_text())
    assert evidence.errors_of_verdict(verdict | {"verdict": verdict["verdict"] | {"word": "clean"}})
    assert evidence.errors_of_verdict({name: value for name, value in verdict.items() if name != "metrics"})
    log = json.loads((folder / "findings.sarif").read_text())
    log["runs"][0]["results"][0]["level"] = "fatal"
    assert evidence.errors_of_sarif(log)
    bom = json.loads((folder / "bom.cdx.json").read_text())
    bom["components"][0]["type"] = "network"
    assert evidence.errors_of_bom(json.dumps(bom))


def test_the_name_of_a_class_has_no_meaning_in_the_table_of_the_model_card(lfd):
    verdict = json.loads((lfd[1] / "verdict.json").read_text())
    card = (lfd[1] / "model_card.md").read_text()
    assert "**Evidence for: What came out.**" in card and verdicts.STATEMENT in card
    name = "![x](http://evil/a.png) [y](z) `b` *c* __d__ # e | f <img src=g> \\"
    verdict["metrics"] = [verdict["metrics"][0] | {"of": name, "value": None, "why": "![why](z)"}]
    (line,) = [line for line in model_card.build(verdict).splitlines() if "evil" in line]
    assert not re.search(r"(?<!\\)[`*_#]|(?<!\\)!?\[|(?<!\\)\]|<", line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 9, "a name ends no cell"
    assert r"\!\[x\](http" in line and r"\| f &lt;img" in line and r"\!\[why\]" in line


def test_an_unknown_number_is_the_word_unknown_in_the_bom(tmp_path):
    results = stored("audit_model/digits-unseen-seed")
    suspects = {"models/": "ab" * 32}
    held_out = dataclasses.replace(ROWS, files=(), labels=np.arange(6, dtype=np.int32), num_classes=10, class_names=())
    folder = write(tmp_path, results, Subject({"held-out rows": held_out}, suspects=suspects), "audit_model")
    verdict = evidence.check(folder)
    assert verdict["run"]["kind"] == "audit of models" and verdict["exit_code"] == 3
    words = {entry["model"]: entry["word"] for entry in verdict["outcomes"]}
    assert words == {model["title"]: model["outcome"] for model in results["models"]} and len(set(words.values())) == 2
    assert verdict["verdict"]["word"] == "found" and verdict["suspect_models"][0]["sha256"] == "ab" * 32
    bom = json.loads((folder / "bom.cdx.json").read_text())
    values = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    asr = [entry for entry in values if entry["type"] == "asr"]
    assert len(asr) == len(results["models"]) and {entry["value"] for entry in asr} == {"unknown"}
    found = [
        entry for entry in verdict["metrics"] if entry["metric"] == "reversed_trigger_success" and entry["value"] > 0.9
    ]
    assert found and all(entry["rows"] in (5, 6) and entry["control"] is not None for entry in found)
    (run,) = json.loads((folder / "findings.sarif").read_text())["runs"]
    rules = [result["ruleId"] for result in run["results"]]
    assert rules.count("model-with-trigger") == sum(len(model["found"]) for model in results["models"])


@pytest.mark.parametrize(
    ("name", "experiment", "methods", "word_of"),
    [
        ("ta_kd/digits-quick", "ta_kd", ("student",), ta_kd_reporting.word_of),
        (
            "robust_kd/digits-baselines",
            "robust_kd",
            ("robust_kd",),
            lambda results, *names: students.word_of(results, *names, students.plain_method(results)),
        ),
        ("vbd/cifar10-all-rows-faint", "vbd", ("vbd",), lambda results, *names: None),
    ],
)
def test_other_runs_have_evidence_too(tmp_path, name, experiment, methods, word_of):
    results = stored(name)
    subject = Subject({"training data": ROWS}, methods=methods, word_of=lambda *names: word_of(results, *names))
    verdict = evidence.check(write(tmp_path, results, subject, experiment))
    assert verdict["run"]["kind"] == ("detectors" if experiment == "vbd" else "defenses")
    assert any(entry["role"] == "subject" for entry in verdict["metrics"])
    if experiment == "ta_kd":
        clean = next(cell for cell in results["cells"] if cell["method"] == "clean")
        student = [entry for entry in verdict["metrics"] if entry["method"] == "student" and entry["metric"] == "asr"]
        assert [entry["control"] for entry in student] == [clean["summary"]["asr"]["mean"]]


def test_a_plugin_is_a_library_with_a_purl_of_its_own(lfd):
    verdict = json.loads((lfd[1] / "verdict.json").read_text())
    plugins = {
        "attack stripe": "bdjax-stripe 0.1",
        "defense stripe": "bdjax-stripe 0.1",
        "model m": "My.Nets_2 1!2.0+local.1",
    }
    facts = Facts("lfd", "LfD", "bdjax lfd", {}, RECORD | {"plugins": plugins}, Verdict("info", "", ""), "", {}, {})
    document = bom.build(verdict, facts)
    assert evidence.errors_of_bom(json.dumps(document)) == []
    found = {entry["purl"]: entry for entry in document["components"] if "purl" in entry}
    plain, odd = (PackageURL.from_string(purl) for purl in list(found)[-2:])
    assert (plain.type, plain.name, plain.version) == ("pypi", "bdjax-stripe", "0.1")
    assert (odd.type, odd.name, odd.version) == ("pypi", "my-nets-2", "1!2.0+local.1")
    assert [entry["name"] for entry in found.values()][-2:] == ["bdjax-stripe", "My.Nets_2"]
    assert all(" " not in purl and len(re.findall("@", purl)) == 1 for purl in found)


def words_of(results: dict, words: dict[str, str | None], **fields) -> dict:
    """The verdict of a run whose subject has these words, by attack."""
    subject = Subject({}, methods=("lfd",), word_of=lambda attack, method: words.get(attack), **fields)
    facts = Facts("lfd", "LfD", "bdjax lfd", {}, RECORD, Verdict("info", "So.", "So."), "", {}, {})
    return verdicts.build(results, facts, subject)


@pytest.mark.parametrize(
    ("first", "rest", "worst", "outcome"),
    [
        (None, "removed", "not measured", "unknown"),
        (None, "removed at a cost", "not measured", "unknown"),
        (None, "nothing to remove", "not measured", "unknown"),
        (None, None, "not measured", "unknown"),
        (None, "weakened", "weakened", "fail"),
        (None, "kept", "kept", "fail"),
        ("nothing to remove", "removed", "removed", "pass"),
    ],
)
def test_an_outcome_that_is_unknown_never_passes(lfd, first, rest, worst, outcome):
    attacks = [attack["attack"] for attack in lfd[0]["attacks"] if not attack["is_clean"]]
    given = dict.fromkeys(attacks, rest) | {attacks[0]: first}
    verdict = words_of(lfd[0], given)
    found = {entry["attack"]: entry["word"] for entry in verdict["outcomes"]}
    assert found == {attack: word or "not measured" for attack, word in given.items()}
    assert verdict["verdict"]["word"] == worst
    assert evidence.errors_of_verdict(verdict | {"time": "2026-01-01T00:00:00Z"}) == []
    (line,) = gate.decide(verdict, words=["removed", "removed at a cost", "nothing to remove"])
    assert line.outcome == outcome


def test_a_detector_that_could_not_test_a_set_is_not_found():
    results = stored("vbd/cifar10-all-rows-faint")
    subject = Subject({}, methods=("vbd",), word_of=lambda attack, method: words.get(attack))
    attacks = [attack["attack"] for attack in results["attacks"] if not attack["is_clean"]]
    assert len(attacks) > 1
    for word, worst in (("found", "not measured"), ("partly", "partly"), ("missed", "missed")):
        words = dict.fromkeys(attacks, word) | {attacks[0]: None}
        facts = Facts("vbd", "VBD", "bdjax vbd", {}, RECORD, Verdict("info", "So.", "So."), "", {}, {})
        assert verdicts.build(results, facts, subject)["verdict"]["word"] == worst


def test_the_method_that_others_are_compared_with_has_no_outcome(lfd):
    results = copy.deepcopy(lfd[0])
    other = next(method for method in results["methods"] if method["base"] not in ("none", "clean", "lfd"))
    results["methods"] = [method for method in results["methods"] if method["base"] != "lfd"]
    results["cells"] = [cell for cell in results["cells"] if cell["method"] != "lfd"]
    outcomes = words_of(results, {}, compared_with=other["method"])["outcomes"]
    assert outcomes and other["method"] not in {entry["method"] for entry in outcomes}


@pytest.mark.parametrize("name", ["lfd", "lfd:epochs=3"])
def test_no_other_method_stands_in_for_one_that_was_left_out(lfd, name):
    results = copy.deepcopy(lfd[0])
    results["methods"] = [method for method in results["methods"] if method["base"] != "lfd"]
    results["cells"] = [cell for cell in results["cells"] if cell["method"] != "lfd"]
    words = dict.fromkeys((attack["attack"] for attack in results["attacks"]), "removed")
    assert words_of(results, words)["verdict"]["word"] == "removed", "LfD was not asked for"
    verdict = words_of(results | {"left_out": {name: "not testable"}}, words)
    assert {entry["role"] for entry in verdict["metrics"]} == {"baseline", "other"} and verdict["outcomes"] == []
    lines = gate.decide(verdict, max_asr=1.0, min_cda=0.0, words=["removed"])
    assert [line.outcome for line in lines] == ["unknown"] * 3 and gate.status_of(lines) == 4
    assert "the verdict has no asr of what the run is about" in lines[0].text


NOISE = {"kind": "noise patch", "success": 0.8, "controls": 0.2, "p_value": 1e-5}
SMALL = {
    "dataset": "photos",
    "attacks": [{"attack": name, "title": name.title()} for name in ("badnets", "blended", "sig", "wanet")],
    "methods": [{"method": "lfd:epochs=3", "title": "LfD"}],
    "classes": [
        {"class": 0, "title": "cat", "finding": "trigger", "pattern_success": 0.97, "mask_pixels": 9, "against": []},
        {"class": 1, "title": "dog", "finding": "weak", "pattern_success": 0.9, "mask_pixels": 40, "against": ["many"]},
        {"class": 2, "title": "ten", "finding": "none", "pattern_success": None},
    ],
    "models": [
        {
            "title": "model 1",
            "outcome": "found",
            "found": [1],
            "classes": [
                {"class": name, "title": title, "norm": 9.0, "success": 0.99, "transfer": 0.1, "p_value": 0.01}
                | {"by": ["reversed trigger", "random triggers"], "random_triggers": NOISE}
                for name, title in enumerate(("cat", "dog"))
            ],
        },
        {"title": "model 2", "outcome": "could not be tested", "reason": "no answers", "found": [], "classes": []},
        {"title": "model 3", "outcome": "nothing found", "reason": "", "found": [], "classes": []},
    ],
    "not_tested": [
        {"title": "VBD", "reason": "too few rows", "classes": {}},
        {"title": "AC", "reason": "", "classes": {"1 (dog)": "has 3 rows", "2": "has none"}},
    ],
}


def test_every_finding_has_its_rule_its_level_and_its_place():
    facts = Facts("lfd", "LfD", "bdjax lfd", {}, RECORD, Verdict("info", "", ""), "2026-01-01T00:00:00Z", {}, {})
    words = zip(SMALL["attacks"], ("kept", "weakened", "removed", "not measured"), strict=True)
    verdict = {
        "tool": {"version": "0.1"},
        "exit_code": 3,
        "statement": verdicts.STATEMENT,
        "verdict": {"word": "kept"},
        "run": {"settings_sha256": "ab" * 32},
        "outcomes": [{"attack": of["attack"], "method": "lfd:epochs=3", "word": word} for of, word in words],
    }
    log = sarif.build(SMALL, verdict, facts, Subject({}, (Flagged("LfD", ROWS, np.arange(6) == 1, None),)))
    assert evidence.errors_of_sarif(log) == []
    (run,) = log["runs"]
    found = []
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (place,) = result["locations"][0]["logicalLocations"]
        found.append((result["ruleId"], result["level"], place["kind"], place["fullyQualifiedName"]))
    assert found == [
        ("flagged-row", "warning", "row", "photos/class 1 (dog)/row 1"),
        ("class-with-pattern", "error", "class", "photos/cat"),
        ("class-with-pattern", "warning", "class", "photos/dog"),
        ("model-with-trigger", "error", "class", "model 1/dog"),
        ("backdoor-remains", "error", "method", "Badnets/LfD"),
        ("backdoor-remains", "warning", "method", "Blended/LfD"),
        *[("not-tested", "none", "method", name) for name in ("VBD", "AC", "AC")],
        ("not-tested", "none", "model", "model 2"),
    ]
    assert {rule for rule, *_ in found} == set(sarif.RULES)
    texts = [result["message"]["text"] for result in run["results"]]
    first, second = texts[3].split(". ")
    assert first.startswith("A mask of 9.0 pixels turns 99.0% of held-out rows into dog")
    assert 'of the kind "noise patch" turns 80 %' in second and "20 % on control networks" in second
    assert texts[2].endswith("dog; the evidence is weak: many.") and "Badnets: the backdoor is kept." in texts[4]
    assert texts[-4:] == [
        "VBD: too few rows.",
        "AC: class 1 (dog) has 3 rows.",
        "AC: class 2 has none.",
        "model 2: no answers.",
    ]


# ---- The gate -------------------------------------------------------------------------------------------------------


def entry(value: float | None, method: str = "lfd", role: str = "subject", name: str = "asr") -> dict:
    return verdicts.metric(name, f"{method} on badnets", value, method=method, role=role, control=0.01, rows=323)


def verdict_of(*entries: dict, word: str = "removed") -> dict:
    return {
        "schema": verdicts.NAME,
        "schema_version": verdicts.VERSION,
        "verdict": {"word": word},
        "metrics": [*entries],
    }


@pytest.mark.parametrize(
    ("entries", "limit", "outcome", "text"),
    [
        ([entry(0.1)], 0.1, "pass", "--max-asr=0.1: asr of lfd on badnets is 0.1 (control 0.01, 323 rows)"),
        ([entry(0.1)], 0.099, "fail", "--max-asr=0.099: asr of lfd on badnets is 0.1 (control 0.01, 323 rows)"),
        ([entry(0.05), entry(0.02)], 0.1, "pass", ", the largest of 2"),
        ([entry(0.05), entry(0.2)], 0.1, "fail", "is 0.2"),
        (
            [entry(None)],
            1.0,
            "unknown",
            "asr of lfd on badnets is unknown (not measured in this run); an unknown number",
        ),
        ([entry(0.0), entry(None)], 1.0, "unknown", "an unknown number never passes"),
        ([entry(0.5), entry(None)], 0.1, "fail", "is 0.5"),
        ([], 1.0, "unknown", "the verdict has no asr"),
        ([entry(1.0, "none", "baseline"), entry(0.0)], 0.1, "pass", "is 0 "),
        ([entry(1.0, "none", "baseline")], 0.1, "unknown", "the verdict has no asr"),
    ],
)
def test_the_gate_flips_across_a_threshold_and_refuses_what_is_unknown(entries, limit, outcome, text):
    (line,) = gate.decide(verdict_of(*entries), max_asr=limit)
    assert line.outcome == outcome and text in line.text
    assert gate.status_of([line]) == {"pass": 0, "fail": 3, "unknown": 4}[outcome]


def test_several_rules_and_other_methods():
    verdict = verdict_of(entry(0.2), entry(0.9, name="cda"), entry(0.05, "abl", "other"))
    lines = gate.decide(verdict, max_asr=0.1, min_cda=0.9, words=["removed"])
    assert [line.outcome for line in lines] == ["fail", "pass", "pass"] and gate.status_of(lines) == 3
    (line,) = gate.decide(verdict, max_asr=0.1, method="abl")
    assert line.outcome == "pass"
    (line,) = gate.decide(verdict, min_cda=0.91)
    assert line.outcome == "fail"
    (line,) = gate.decide(verdict_of(word="could not be tested"), words=["nothing found"])
    assert line.outcome == "unknown"
    (line,) = gate.decide(verdict_of(word="found"), words=["nothing found"])
    assert line.outcome == "fail"
    with pytest.raises(InputError, match="--method 'nad' is not in the verdict; it has lfd, abl"):
        gate.decide(verdict, max_asr=0.1, method="nad")
    with pytest.raises(InputError, match="no rule; give --max-asr"):
        gate.decide(verdict)
    with pytest.raises(InputError, match="--require-verdict"):
        gate.decide(verdict, words=["clean"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is no verdict"),
        ('{"schema": "other"}', "is no verdict"),
        (json.dumps(verdict_of() | {"schema_version": "2.0"}), "has version '2.0' of the schema, not 1.0"),
        (json.dumps(verdict_of(word="clean")), "has no verdict that is known"),
        (json.dumps(verdict_of({"metric": "asr"})), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5))).replace("0.5", "NaN"), "NaN is no number"),
        (json.dumps(verdict_of(entry(0.5))).replace("0.5", "true"), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5))).replace("0.5", '"0"'), "has metrics of another form"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps(verdict_of(entry(0.5))).replace("0.5", "9" * 400), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5, name="f1"))).replace("0.5", "9" * 400), "has metrics of another form"),
        (json.dumps(verdict_of(entry(-5.0))), "has metrics of another form"),
        (json.dumps(verdict_of(entry(1.5, name="cda"))), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5) | {"control": -0.1})), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5) | {"rows": {"a": 1}})), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5) | {"rows": -1})), "has metrics of another form"),
        (json.dumps(verdict_of(entry(0.5) | {"rows": True})), "has metrics of another form"),
    ],
)
def test_a_file_that_is_no_verdict_is_one_line(tmp_path, text, message):
    path = tmp_path / "verdict.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        gate.read(path)
    assert "\n" not in str(error.value) and "a verdict.json that --evidence has written is needed" in str(error.value)


@pytest.mark.parametrize("mark", ["  ", " *"], ids=["text", "binary"])
def test_sums_of_either_mode_of_sha256sum_are_compared(tmp_path, mark):
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(verdict_of(entry(0.5))))
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{writing.sha256(path)}{mark}verdict.json\n")
    assert gate.read(path)["schema"] == verdicts.NAME
    sums.write_text(f"{'0' * 64}{mark}verdict.json\n")
    with pytest.raises(InputError, match="is not the file that SHA256SUMS beside it names"):
        gate.read(path)


def test_a_verdict_that_was_changed_is_refused(lfd, tmp_path):
    folder = write(tmp_path, lfd[0], lfd_subject(lfd[0]))
    assert gate.read(folder / "verdict.json")["schema"] == verdicts.NAME
    text = (folder / "verdict.json").read_text()
    (folder / "verdict.json").write_text(text.replace('"seeds": 3', '"seeds": 4', 1) + " ")
    with pytest.raises(InputError, match="is not the file that SHA256SUMS beside it names"):
        gate.read(folder / "verdict.json")
