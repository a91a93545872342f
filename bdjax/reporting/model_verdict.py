"""The words of an audit of models: its three outcomes, the evidence in sentences, what it cannot see, and what to do next.

The outcomes, their exit statuses and their colours are those of an audit of data, `bdjax/reporting/audit_verdict.py`. In every
function `results` is from `bdjax.reporting.model_page.summarise`, and `model` is an entry of results["models"].
"""

import shlex
from collections.abc import Sequence

from bdjax.evaluation.model_audit import RANDOM, REVERSED
from bdjax.evaluation.variants import NOT_TESTED
from bdjax.inspection.random_triggers import KINDS
from bdjax.reporting.audit_verdict import capital, listed, percent
from bdjax.reporting.report import Verdict
from bdjax.reporting.sections import Entry
from bdjax.run import command_line

CANNOT_SEE = (
    "The tests look for a patch or faint picture that turns any image into one class. They cannot see triggers that "
    "differ from image to image (input-aware, warped), that only act on some classes, or that move each class to another "
    "(all-to-all), except by chance; they see large patterns and semantic triggers, such as an object in the scene, badly or "
    "not at all. Random triggers, where they are drawn, find a backdoor only if it reacts to triggers that resemble its own."
)
EASY_TO_FIND = (
    "The planted square is about the easiest trigger there is: that it was found does not mean that another would have been, "
    "above all where the control networks are fooled by small patches, too, as weak networks on photographs are."
)
NO_PROOF = (
    "No test of this kind can show that a model has no backdoor: what was not found may be there, and an attacker who knows "
    "the test can avoid it."
)
LESS_ACCURATE = 0.05
"""How much less accurate than the control networks a model is whose finding is doubted for that reason; ours."""
MOST_MODELS = 4
"""Most models that a sentence names."""


# ---- Verdict --------------------------------------------------------------------------------------------------------


def verdict(results: Entry) -> Verdict:
    """Put the numbers into words."""
    models = results["models"]
    of_outcome = {
        outcome: [model for model in models if model["outcome"] == outcome]
        for outcome in ("found", "nothing found", "could not be tested")
    }
    found, nothing, untested = of_outcome.values()
    texts = [evidence_text(results, model) for model in found[:MOST_MODELS]]
    if len(found) > MOST_MODELS:
        texts.append(f"{len(found) - MOST_MODELS} more models are in the tables below.")
    if nothing and found:
        texts.append(f"Nothing found in {titles(nothing)}.")
    for model in untested[:MOST_MODELS]:
        if found or nothing:
            texts.append(f"{capital(model['title'])} {NOT_TESTED}: {model['reason']}.")
    if found:
        headline = found_headline(results, found)
    elif nothing:
        where = "the model" if len(models) == 1 else titles(nothing)
        headline = f"Nothing found in {where}; {sensitivity_clause(results)}."
        texts += [*(closest_text(results, model) for model in nothing[:MOST_MODELS]), EASY_TO_FIND]
    else:
        headline = f"{capital(untested[0]['title'])} {NOT_TESTED}: {untested[0]['reason']}."
        if len(untested) > 1:
            headline = f"None of the {len(untested)} models could be tested: {untested[0]['reason']}."
        texts.append("Nothing is known about a backdoor: this is no sign that there is none, nor that there is one.")
    if results["controls"]:
        texts += [p_value_text(results), response_text(results)]
    texts += [CANNOT_SEE, *([] if found else [NO_PROOF])]
    level = {"found": "found", "nothing found": "nothing_found", "could not be tested": "not_tested"}[
        results["outcome"]
    ]
    return Verdict(level, headline, "\n\n".join(filter(None, texts)))


def found_headline(results: Entry, found: Sequence[Entry]) -> str:
    """ "A trigger into class 3 (cat) was found in the model."."""
    if len(results["models"]) == 1:
        classes = listed([entry for entry in found[0]["classes"] if entry["found"]])
        return f"A trigger into {classes[:1].lower()}{classes[1:]} was found in the model."
    labels = {entry["title"] for model in found for entry in model["classes"] if entry["found"]}
    where = f", always into {next(iter(labels))}" if len(labels) == 1 and len(found) > 1 else ""
    return f"A trigger was found in {len(found)} of {len(results['models'])} models{where}."


def evidence_text(results: Entry, model: Entry) -> str:
    """The evidence for each found class of a model, in a sentence."""
    height, width, _ = results["image_shape"]
    texts = []
    for entry in (entry for entry in model["classes"] if entry["found"]):
        index = "" if entry["index"] is None else f", anomaly index {entry['index']:.2f}"
        if REVERSED in entry["by"]:
            texts.append(
                f"a mask of {entry['norm']:.1f} of {height * width:,} pixels turns {percent(entry['success'])} of held-out "
                f"rows into {entry['title']}{index}; on control networks the same trigger turns {percent(entry['transfer'])}; "
                f"{p_text(results, entry)}"
            )
        if RANDOM in entry["by"]:
            texts.append(random_text(entry))
    who = "The model" if len(results["models"]) == 1 else capital(model["title"])
    return " ".join(filter(None, [f"{who}: {'; '.join(texts)}.", accuracy_text(results, model), support_text(model)]))


def accuracy_text(results: Entry, model: Entry) -> str:
    """A doubt about a finding in a model that is worse than the control networks; "" without one."""
    lack = results["controls"]["accuracy"] - model["accuracy"]
    if lack <= LESS_ACCURATE:
        return ""
    return (
        f"But it predicts {100 * lack:.0f} percentage points fewer held-out rows correctly than the control networks do: a "
        "network that is worse than they are may react more to any trigger, without a backdoor."
    )


def random_text(entry: Entry) -> str:
    """The evidence by random triggers for a class."""
    of_random = entry["random_triggers"]
    return (
        f'the strongest tenth of random triggers of the kind "{of_random["kind"]}" turns {percent(of_random["success"])} of '
        f"held-out rows into {entry['title']}, and {percent(of_random['controls'])} on control networks; "
        f"p = {of_random['p_value']:.1g} if clean networks differed by normal noise"
    )


def p_text(results: Entry, entry: Entry) -> str:
    """ "p ≤ 0.10, the smallest that 9 control networks allow"."""
    least, count = 1 / (results["controls"]["count"] + 1), results["controls"]["count"]
    text = f"p = {entry['p_value']:.2g}"
    if entry["p_value"] <= least:
        text += f", the smallest that {count} control networks allow"
    return text


def support_text(model: Entry) -> str:
    """What the two other detectors say, and whether they agree; "" without weights."""
    if not model["weights"]:
        return ""
    last, channels = model["weights"]["last_layer"], model["weights"]["channels"]
    labels = [entry["class"] for entry in model["classes"] if entry["found"]]
    agrees = last["is_outlier"] and last["class"] in labels
    first = (
        f"The weights of the last layer agree: {last['title']} has the largest mean, more of an outlier than in any control "
        "network"
        if agrees
        else "The weights of the last layer show nothing beyond the control networks"
        if not last["is_outlier"]
        else f"The weights of the last layer point to another class, {last['title']}"
    )
    second = (
        "a channel is more sensitive than in any control network"
        if channels["is_outlier"]
        else "no channel is more sensitive than those of the control networks"
    )
    return f"{first}; {second}."


def top_class(model: Entry) -> Entry | None:
    """The found class with the largest score; without a finding the class with the largest score, which came closest.

    The number of things that speak against a class would not do: it is smaller for a class that is far from one limit than for
    one that misses all of them by little.
    """
    return max(model["classes"], key=lambda entry: (entry["found"], entry["score"]), default=None)


def closest_text(results: Entry, model: Entry) -> str:
    """What came closest to a finding in a model where nothing was found."""
    entry = top_class(model)
    if entry is None:
        return ""
    who = "" if len(results["models"]) == 1 else f"{capital(model['title'])}: "
    text = f"{who}{capital(entry['title'])} came closest, but {' and '.join(entry['against'])}."
    responses = [of_class["random_triggers"] for of_class in model["classes"] if of_class["random_triggers"]]
    if responses:
        top = max(responses, key=lambda of_random: of_random["deviations"])
        text += (
            f" Of random triggers the strongest turn {percent(top['success'])} of rows into a class, and "
            f"{percent(top['controls'])} on control networks."
        )
    return text


def sensitivity_clause(results: Entry) -> str:
    """ "a 3×3 white square planted in a network like it was found"."""
    return f"a {results['planted']['title']} planted in a network trained on the clean rows was found"


def p_value_text(results: Entry) -> str:
    """What the p-value is of, and what it assumes."""
    count, models = results["controls"]["count"], len(results["models"])
    text = (
        f"The p-value is nearly exact if the model, had it no backdoor, were one more draw like the {count} control "
        f"networks. They have its architecture, but were trained on the {results['clean_rows']:,} clean rows by this run's "
        "recipe; how the model was trained is not known."
    )
    if results["black_box"]:
        text = (
            f"The p-value is only a rank among the {count} control networks: triggers are searched on these directly, but "
            "through a surrogate of the same architecture for the model, whose architecture is not known."
        )
    text += f" With {count} of them it cannot be below {1 / (count + 1):.2g}."
    if models > 1:
        by_chance = f"{models / (count + 1):.2g}"
        text += f" Of {models} models without a backdoor about {by_chance} would have so small a p-value by chance."
    findings = results["controls"]["findings"]
    text += " The rule for a finding, applied to each control network beside the others, finds a trigger in "
    return f"{text}{findings} of {count}{': such false alarms must be expected.' if findings else '.'}"


def response_text(results: Entry) -> str:
    """What the p-value of random triggers is of; "" where none were drawn."""
    if not results["random_triggers"]:
        return ""
    return (
        f"Random triggers: {results['random_triggers']} of each of {len(KINDS)} kinds, on a few held-out rows. Their p-value "
        "counts all kinds and classes, but it is a rule for a limit and no error rate: a clean network, too, may react to some "
        "kind of patch more than others do."
    )


def titles(models: Sequence[Entry]) -> str:
    """ "model 2", "models 2 and 3", or "5 models"."""
    if len(models) > MOST_MODELS:
        return f"{len(models)} models"
    names = [model["title"] for model in models]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- What to do next ------------------------------------------------------------------------------------------------


def next_steps(results: Entry) -> list[str]:
    """What the owner of the models can do now, as paragraphs."""
    if results["outcome"] == "could not be tested":
        return [
            "Nothing is known about this model. What helps depends on the reason above: more clean rows (--clean-rows), more "
            "epochs of the control networks (--epochs), or the model's weights in place of its answers alone."
        ]
    texts = []
    if results["outcome"] == "found":
        texts.append(
            "Look at the triggers below. Do not use the model as it is, and find out where it came from. The reversed trigger "
            "is rarely the attacker's: it is the smallest that has the same effect. A random trigger that works resembles the "
            "attacker's in some way, as far as the finding is no false alarm."
        )
    else:
        texts.append(
            "Nothing found is no reason to trust a model of unknown origin. A student that learns from its answers on clean "
            "rows inherits less of what this audit cannot see."
        )
    if results["commands"]:
        texts.append(f"A clean student of it: {'; or '.join(results['commands'])}.")
    return texts


def commands(
    data: Sequence[str], texts: Sequence[str], members: int, is_white: bool = False, outputs: str = "logits"
) -> list[str]:
    """The commands that make a clean student from the audited models.

    Args:
        data: the flags that name the data.
        texts: the models, as given to this run.
        members: how many models they are.
        is_white: whether their weights are known, which `bdjax robust-kd` needs.
        outputs: what black boxes return.
    """
    returned = [] if outputs == "logits" else [f"--outputs={outputs}"]
    voted = "ta_kd", [*data, *returned, "--teachers", *texts]
    alone = "robust_kd", [*data, *[f"--teacher={text}" for text in texts]]
    found = [alone, voted] if is_white and len(texts) == members == 1 else [voted]
    return [f"{command_line.invocation(name)} {shlex.join(words)}" for name, words in found]
