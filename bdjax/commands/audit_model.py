"""Audit of models: is there a backdoor, into which class, and what does its trigger look like?

Clean rows are all that is needed beside the model: --dataset names them. Triggers are searched by Neural Cleanse (Wang et al.
2019), on the model and on clean control networks of its architecture that are trained here. The exit status is 3 if a trigger
was found, 0 if nothing was found, 4 if no model could be tested, 2 for input that cannot be used. The same command continues an
interrupted run, and ends at the same numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdjax.errors import InputError
from bdjax.exchange import safetensors_files
from bdjax.run import presets
from bdjax.run.checks import check_path, check_ranges
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


def check(config: Config) -> None:
    """Refuse settings out of range, whatever the data and the models.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)
    for text in config.model:
        if not text:
            raise InputError("--model is empty; give it a folder, a file or an address")
        check_path("--model", text)
    if config.seeds != 1:
        raise InputError(f"--seeds {config.seeds} does not apply to an audit of models; set --controls instead")
    if config.target:
        raise InputError(f"--target {config.target} does not apply to an audit of models: it looks at every class")
    if config.like:
        raise InputError("--like does not apply to an audit of models, whose settings follow --dataset")


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments, check)
    safetensors_files.refuse_early(config.model)
    from bdjax.run.log import StageLog
    from bdjax.workflows import audited_models

    log = log or StageLog()
    given = audited_models.read(config, EXPERIMENT, log)
    # After the files, which may be refused: this takes seconds.
    from bdjax.workflows import audit_model

    return audit_model.run(config, EXPERIMENT, given, log)
