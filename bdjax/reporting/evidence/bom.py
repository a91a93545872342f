"""bom.cdx.json: an ML-BOM in CycloneDX 1.6, the Machine Learning Bill of Materials of OWASP.

Its subject is what the run is about: the audited rows, or the network that is audited or defended. The model card with the
quantitative analysis is on a network: of an audit of data, on the detector.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from bdjax.reporting.evidence.subject import Facts
from bdjax.reporting.evidence.verdict import of_subject
from bdjax.run.text import printable

SPEC_VERSION = "1.6"
_TASK = "image classification"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/bdjax")
UNKNOWN = "unknown"


def build(verdict: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The content of bom.cdx.json.

    Args:
        verdict: from `verdict.build`.
        facts: the run.
    """
    data = [_data(entry) for entry in verdict["data"]]
    networks = [_network(folder, about, verdict) for folder, about in facts.networks.items()]
    suspects = [_suspect(entry) for entry in verdict["suspect_models"]]
    libraries = [
        _library(name, version) for name, version in facts.record.get("versions", {}).items() if version is not None
    ]
    libraries += map(_plugin, dict.fromkeys(facts.record.get("plugins", {}).values()))
    card = _model_card(verdict, [entry["bom-ref"] for entry in data])
    components = [*suspects, *networks, *libraries]
    if verdict["run"]["kind"] in ("audit of data", "detectors") and data:
        subject, data = data[0], data[1:]
        title = ", ".join(dict.fromkeys(entry["method"] for entry in verdict["metrics"]))
        components = [_model("detector", f"detector {title}", modelCard=card), *components]
    else:
        subject = _model("subject", verdict["run"]["title"], modelCard=card)
    components = [*data, *components]
    digest = verdict["run"]["settings_sha256"]
    # The same content has the same serial number; the time is no content.
    content = repr((digest, verdict["metrics"], verdict["files"], verdict["data"]))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}",
        "version": 1,
        "metadata": {
            "timestamp": verdict["time"],
            "tools": {"components": [_tool(verdict["tool"])]},
            "component": subject,
            "properties": [
                _property("statement", verdict["statement"]),
                _property("experiment", verdict["run"]["experiment"]),
                _property("settings_sha256", digest),
                _property("verdict", verdict["verdict"]["word"]),
                _property("exit_code", str(verdict["exit_code"])),
            ],
        },
        "components": components,
        "dependencies": [
            {"ref": subject["bom-ref"], "dependsOn": [entry["bom-ref"] for entry in components]},
            *({"ref": entry["bom-ref"]} for entry in components),
        ],
    }


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": f"bdjax:{name}", "value": printable(value)}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    version = {"version": tool["version"]} if tool["version"] else {}
    revision = {"properties": [_property("git_revision", tool["git_revision"])]} if tool["git_revision"] else {}
    return {"type": "application", "name": tool["name"], **version, **revision}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _model(ref: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "machine-learning-model", "bom-ref": ref, "name": printable(name), **fields}


def _data(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset. Its hash is of the rows as read, which is no hash of a file, so it is a property."""
    shape = "×".join(map(str, entry["image_shape"]))
    return {
        "type": "data",
        "bom-ref": f"data: {entry['part']}",
        "name": printable(entry["name"]),
        "description": f"{entry['part']}: {entry['rows']:,} images of {shape}, {len(entry['classes'])} classes",
        "data": [{"type": "dataset", "name": entry["part"], "description": printable(entry["source"])}],
        "properties": [_property("rows_sha256", entry["sha256"])],
    }


def _suspect(entry: Mapping[str, Any]) -> dict[str, Any]:
    return _model(f"suspect: {entry['name']}", entry["name"], properties=[_property("sha256", entry["sha256"])])


def _network(folder: str, about: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A network that the run has left, with its own numbers where the run has them."""
    made_by = about.get("made_by", {})
    own = [
        entry
        for entry in verdict["metrics"]
        if entry["method"] == made_by.get("defense", made_by.get("role"))
        and entry["attack"] == made_by.get("attack", entry["attack"])
    ]
    parameters = {
        "task": _TASK,
        "architectureFamily": "convolutional neural network",
        "modelArchitecture": f"{about['architecture']} width {about['width']}",
        "approach": {"type": "supervised"},
    }
    card = {"modelParameters": parameters, **({"quantitativeAnalysis": _analysis(own)} if own else {})}
    description = ", ".join(f"{name} {value}" for name, value in made_by.items())
    hashes = _hashes(about["tensors_sha256"])
    return _model(f"network: {folder}", folder, description=printable(description), hashes=hashes, modelCard=card)


def _library(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:generic/python@{version}" if name == "python" else f"pkg:pypi/{name}@{version}"
    kind = "platform" if name == "python" else "library"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _plugin(distribution: str) -> dict[str, Any]:
    """An installed plugin: "bdjax-stripe 0.1", the name and version of its distribution."""
    name, _, version = distribution.partition(" ")
    normal = re.sub(r"[-_.]+", "-", name).lower()  # as PyPI writes names
    purl = f"pkg:pypi/{quote(normal, safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": printable(name), "version": printable(version), "purl": purl}


def _model_card(verdict: Mapping[str, Any], data: Sequence[str]) -> dict[str, Any]:
    return {
        "modelParameters": {"task": _TASK, "datasets": [{"ref": ref} for ref in data]},
        "quantitativeAnalysis": _analysis(of_subject(verdict["metrics"])),
        "considerations": {
            "useCases": [verdict["statement"]],
            "technicalLimitations": [printable(text) for text in (verdict["verdict"]["headline"], *verdict["limits"])],
        },
    }


def _analysis(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An unknown value is the word "unknown", never a number."""
    return {
        "performanceMetrics": [
            {
                "type": entry["metric"],
                "value": UNKNOWN if entry["value"] is None else repr(entry["value"]),
                "slice": _slice(entry),
            }
            for entry in entries
        ]
    }


def _slice(entry: Mapping[str, Any]) -> str:
    """ "LfD on BadNets; control 0.01; 323 rows; 3 seeds"."""
    parts = [entry["of"]]
    parts += ["control unknown" if entry["control"] is None else f"control {entry['control']!r}"]
    parts += ["rows unknown" if entry["rows"] is None else f"{entry['rows']} rows"]
    if entry["standard_deviation"] is not None:
        parts.append(f"standard deviation {entry['standard_deviation']!r} over {entry['seeds']} seeds")
    if entry["value"] is None:
        parts.append(entry["why"])
    return printable("; ".join(parts))
