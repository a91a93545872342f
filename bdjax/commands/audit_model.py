"""Audit of models: is there a backdoor, into which class, and what does its trigger look like?

Clean rows are all that is needed beside the model: --dataset names them. Triggers are searched by Neural Cleanse (Wang et al.
2019), on the model and on clean control networks of its architecture that are trained here. The exit status is 3 if a trigger
was found, 0 if nothing was found, 4 if no model could be tested, 2 for input that cannot be used. The same command continues an
interrupted run, and ends at the same numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdjax.exchange import safetensors_files
from bdjax.run import presets
from bdjax.run.configs.audit_model import Config
from bdjax.run.experiment import Experiment, read_flags

if TYPE_CHECKING:
    from bdjax.run.log import StageLog


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from: see `presets.start_plainly_from`."""
    return presets.start_plainly_from("audit_model", preset, dataset, Config)


EXPERIMENT = Experiment(
    "audit_model",
    "Audit of models",
    (),
    preset,
    always_shown=("model", "dataset", "preset"),
    positional="model",
)


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    safetensors_files.refuse_early(config.model)
    from bdjax.run.log import StageLog
    from bdjax.workflows import audited_models

    log = log or StageLog()
    given = audited_models.read(config, EXPERIMENT, log)
    # After the files, which may be refused: this takes seconds.
    from bdjax.workflows import audit_model

    return audit_model.run(config, EXPERIMENT, log, given)
