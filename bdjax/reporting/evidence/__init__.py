"""Evidence for a reviewer: what a run measured, in forms that other tools read.

    evidence/verdict.json     the verdict, every number with its control and its rows, thresholds, definitions: `verdict.py`
    evidence/findings.sarif   flagged rows and classes, SARIF 2.1.0: `sarif.py`
    evidence/bom.cdx.json     networks, data and libraries, a CycloneDX 1.6 ML-BOM with a model card: `bom.py`
    evidence/model_card.md    the same for people: `model_card.py`
    evidence/SHA256SUMS       of these files, for `sha256sum -c`

`subject.py` has what a workflow passes in, `writing.py` writes, `gate.py` compares a verdict.json with limits. The same run
writes the same bytes but for the time, which each file has once; SOURCE_DATE_EPOCH sets it, as in reproducible builds.
"""
