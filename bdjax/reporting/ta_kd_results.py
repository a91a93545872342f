"""What a TA-KD run measured, as numbers (results.json) and as tables beside the paper's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bdjax import metrics
from bdjax.attacks.providers import ProviderTriggers
from bdjax.defenses.aggregation import Tie, VoteSpace, hard_vote, soft_vote
from bdjax.inspection.cross_trigger import cross_trigger_matrices
from bdjax.metrics import BackdoorMetrics
from bdjax.reporting.tables import Table, mean_and_spread

TITLES: Mapping[str, str] = {
    "clean": "clean reference",
    "teachers": "teachers (mean)",
    "soft vote": "soft vote",
    "hard vote": "hard vote",
    "aggregated": "aggregated model (TA)",
    "student": "student",
    "alone": "student's net, clean rows only",
    "fine-tuned": "teachers, fine-tuned (mean)",
}
"""Role -> what tables call it, in their order."""

NEEDS: Mapping[str, str] = {
    "clean": "all training rows, clean: a reference nobody has",
    "teachers": "none: the suspect models as they are",
    "soft vote": "suspect models",
    "hard vote": "suspect models",
    "aggregated": "suspect models (logits only), clean rows",
    "student": "the aggregated model, clean rows",
    "alone": "clean rows",
    "fine-tuned": "suspect models (weights), clean rows",
}

MEMBERWISE = ("teachers", "fine-tuned")
"""Roles whose members are each measured under their own trigger."""

# Tables 1 and 2 of Heydari et al. 2025: CDA, ASR, R-ACC. The teachers' row is the mean of the seven printed rows.
PAPER: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "mnist": {
        "clean": (0.994, 0.000, 0.953),
        "teachers": (0.990, 1.000, 0.000),
        "soft vote": (0.995, 0.172, 0.824),
        "hard vote": (0.995, 0.056, 0.939),
        "aggregated": (0.989, 0.001, 0.986),
        "student": (0.989, 0.001, 0.986),
    },
    "cifar10": {
        "clean": (0.853, 0.029, 0.767),
        "teachers": (0.763, 0.906, 0.079),
        "soft vote": (0.839, 0.120, 0.696),
        "hard vote": (0.831, 0.051, 0.769),
        "aggregated": (0.686, 0.026, 0.603),
        "student": (0.668, 0.054, 0.582),
    },
}

_METRICS = ("cda", "asr", "r_acc")
_DELTAS = ("delta_cda", "delta_asr", "delta_r_acc")


def summarise(
    logits: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    triggers: Sequence[ProviderTriggers | None],
    parameters: Mapping[str, int],
    *,
    target: int,
    vote_space: VoteSpace,
    tie: Tie,
) -> dict[str, Any]:
    """Measure every role on every seed.

    Args:
        logits: for each seed, role -> float [members, 1 + T, N, K]; the first view is the untouched test set, the
            others are the same rows under each of T triggers (T may be 0: then there is no ASR).
        labels: int32 [N], true labels.
        triggers: of each seed; None if nobody knows them.
        parameters: role -> trainable parameters of what is deployed.
        target: the attacker's class.
        vote_space: what the soft vote averages.
        tie: who wins a tied hard vote.

    Returns:
        A tree of plain numbers, the same for the same inputs; the content of results.json.
    """
    seeds = []
    for answers, seed_triggers in zip(logits, triggers, strict=True):
        seeds.append(_one_seed(answers, labels, seed_triggers, target, vote_space, tie))
    roles = [role for role in TITLES if role in seeds[0]["models"]]
    return {
        "definitions": metrics.definitions(*_METRICS, *_DELTAS, "delta_per_trigger"),
        "test_rows": len(labels),
        "target": target,
        "triggers": [list(each.names) if each else None for each in triggers],
        "models": {
            role: {
                "title": TITLES[role],
                "needs": NEEDS[role],
                "parameters": parameters.get(role),
                "summary": {
                    name: _spread([seed["models"][role][name] for seed in seeds])
                    for name in (*_METRICS, *_DELTAS)
                    if name in seeds[0]["models"][role]
                },
                "seeds": [seed["models"][role] for seed in seeds],
            }
            for role in roles
        },
        "ties": [seed["ties"] for seed in seeds],
        "cross_trigger": [seed["cross_trigger"] for seed in seeds],
    }


def _one_seed(
    answers: Mapping[str, np.ndarray],
    labels: np.ndarray,
    triggers: ProviderTriggers | None,
    target: int,
    vote_space: VoteSpace,
    tie: Tie,
) -> dict[str, Any]:
    predictions = {role: np.argmax(each, axis=-1) for role, each in answers.items()}  # int [members, 1 + T, N]
    suspects = answers["teachers"]
    num_views = suspects.shape[1]
    predictions["soft vote"] = np.stack([soft_vote(suspects[:, v], vote_space) for v in range(num_views)])[None]
    votes = [hard_vote(suspects[:, v], tie) for v in range(num_views)]
    predictions["hard vote"] = np.stack([vote.predictions for vote in votes])[None]
    measured = {
        role: [metrics.measure(member[0], member[1:], labels, target) for member in each]
        for role, each in predictions.items()
    }
    clean = measured["clean"][0] if "clean" in measured else None
    names = triggers.names if triggers else ()
    models = {
        role: _memberwise(members, names, clean)
        if role in MEMBERWISE
        else _single(members[0], None if role == "clean" else clean)
        for role, members in measured.items()
    }
    ties = [float(np.mean(vote.is_tie)) for vote in votes]
    cross = None
    if num_views > 1:
        rows = [predictions["teachers"], *([predictions["clean"]] if clean else [])]
        asr, r_acc = cross_trigger_matrices(np.concatenate(rows)[:, 1:], labels, target)
        cross = {"asr": np.asarray(asr).tolist(), "r_acc": np.asarray(r_acc).tolist(), "last_row_is_clean": bool(clean)}
    return {"models": models, "ties": {"clean": ties[0], "triggered": ties[1:]}, "cross_trigger": cross}


def _single(measured: BackdoorMetrics, clean: BackdoorMetrics | None) -> dict[str, Any]:
    """One model under all triggers: the means, and each trigger's own numbers."""
    numbers: dict[str, Any] = {"cda": measured.cda, "asr": None, "r_acc": None}
    if len(measured.asr):
        numbers |= {"asr": float(np.mean(measured.asr)), "r_acc": float(np.mean(measured.r_acc))}
        numbers["per_trigger"] = {"asr": measured.asr.tolist(), "r_acc": measured.r_acc.tolist()}
        if clean is not None:
            numbers |= metrics.deltas(clean, measured)
    return numbers


def _memberwise(
    members: Sequence[BackdoorMetrics], names: Sequence[str], clean: BackdoorMetrics | None
) -> dict[str, Any]:
    """Each member under its own trigger, and the means over the members."""
    rows = []
    for i, measured in enumerate(members):
        row: dict[str, Any] = {"cda": measured.cda, "asr": None, "r_acc": None}
        if i < len(names):
            own = BackdoorMetrics(measured.cda, measured.asr[[i]], measured.r_acc[[i]])
            row |= {"trigger": names[i], "asr": float(own.asr[0]), "r_acc": float(own.r_acc[0])}
            if clean is not None:
                row |= metrics.deltas(clean, own, [i])
        rows.append(row)
    means = {
        name: None if rows[0].get(name) is None else float(np.mean([row[name] for row in rows]))
        for name in (*_METRICS, *_DELTAS)
    }
    return {name: value for name, value in means.items() if value is not None or name in _METRICS} | {"members": rows}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds; None where a seed has no number."""
    if any(value is None for value in values):
        return {"mean": None, "standard_deviation": None, "seeds": len(values)}
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": spread, "seeds": len(values)}


def _cells(model: Mapping[str, Any], names: Sequence[str]) -> list[str | None]:
    seeds = model["seeds"]
    return [
        mean_and_spread([seed[name] for seed in seeds]) if seeds[0].get(name) is not None else None for name in names
    ]


def defense_table(results: Mapping[str, Any], dataset: str) -> Table:
    """Table 2 of the paper, with the baselines, and with the paper's own rows where it has this dataset."""
    rows, styles = [], []
    for role, model in results["models"].items():
        rows.append((model["title"], *_cells(model, (*_METRICS, *_DELTAS))))
        styles.append("ours" if role in ("aggregated", "student") else "")
        printed = PAPER.get(dataset, {}).get(role)
        if printed:
            clean = PAPER[dataset]["clean"]
            deltas = (clean[0] - printed[0], printed[1] - clean[1], clean[2] - printed[2])
            rows.append((f"the paper's {model['title']}", *printed, *((None,) * 3 if role == "clean" else deltas)))
            styles.append("paper")
    seeds = len(results["triggers"])
    notes = (
        f"Mean{' ± standard deviation' if seeds > 1 else ''} over {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{results['test_rows']:,} test rows. ASR and R-ACC are averaged over the triggers; teachers are measured each "
        "under its own. Δ is against the clean reference."
    )
    return Table(
        "Defenses", ("", "CDA", "ASR", "R-ACC", "Δ CDA", "Δ ASR", "Δ R-ACC"), tuple(rows), notes, tuple(styles)
    )


def teacher_table(results: Mapping[str, Any], seed: int = 0) -> Table:
    """Table 1 of the paper: each suspect model of one seed under its own trigger."""
    header = ("", "trigger", "CDA", "ASR", "R-ACC", "Δ CDA", "Δ ASR", "Δ R-ACC")
    rows: list[tuple[Any, ...]] = []
    if "clean" in results["models"]:
        clean = results["models"]["clean"]["seeds"][seed]
        rows.append(("clean reference", "mean over all", clean["cda"], clean["asr"], clean["r_acc"], None, None, None))
    for i, member in enumerate(results["models"]["teachers"]["seeds"][seed]["members"]):
        rows.append((f"teacher {i + 1}", member.get("trigger"), *(member.get(name) for name in (*_METRICS, *_DELTAS))))
    return Table("Suspect models", header, tuple(rows), f"Seed {seed + 1} of {len(results['triggers'])}.")


def needs_table(results: Mapping[str, Any]) -> Table:
    """What each row of the comparison was given."""
    rows = tuple((model["title"], model["needs"]) for model in results["models"].values())
    return Table("What each was given", ("", "given"), rows)


def size_table(results: Mapping[str, Any]) -> Table:
    """Table 3 of the paper: what has to be deployed."""
    rows = []
    for role in ("soft vote", "aggregated", "student"):
        model = results["models"][role]
        if model["parameters"] is not None:
            rows.append(("ensemble (votes)" if role == "soft vote" else model["title"], model["parameters"]))
    notes = "The paper, at width 64: 7 × 8.2M, 8.2M and 2.8M."
    return Table("Trainable parameters", ("deployed", "parameters"), tuple(rows), notes)
