"""Every defense of suspect training sets, by name. A new defense needs a file and an entry here; defenses of installed plugins
are found by themselves."""

from bdjax.defenses.abl import ABL
from bdjax.defenses.abm import ABM
from bdjax.defenses.activation_clustering import ACTIVATION_CLUSTERING
from bdjax.defenses.agpd import AGPD
from bdjax.defenses.anp import ANP
from bdjax.defenses.attention_transfer import ATTENTION_TRANSFER
from bdjax.defenses.bab import BAB
from bdjax.defenses.cbd import CBD
from bdjax.defenses.contract import Defense
from bdjax.defenses.fine_pruning import FINE_PRUNING
from bdjax.defenses.fine_tuning import FINE_TUNING
from bdjax.defenses.fkd import FKD
from bdjax.defenses.ft_sam import FT_SAM
from bdjax.defenses.i_bau import I_BAU
from bdjax.defenses.lfd import LFD
from bdjax.defenses.logit_distillation import LOGIT_DISTILLATION
from bdjax.defenses.nad import NAD
from bdjax.defenses.neural_cleanse import NEURAL_CLEANSE
from bdjax.defenses.robust_kd import ROBUST_KD
from bdjax.defenses.scan import SCAN
from bdjax.defenses.spectral_signatures import SPECTRAL_SIGNATURES
from bdjax.defenses.strip import STRIP
from bdjax.defenses.ta_kd_student import TA_KD_STUDENT
from bdjax.defenses.undefended import UNDEFENDED
from bdjax.defenses.vbd import VBD
from bdjax.plugins import Registry, of_type
from bdjax.settings import check_choice

_OWN: dict[str, Defense] = {
    defense.name: defense
    for defense in (
        UNDEFENDED,
        LFD,
        ABM,
        BAB,
        ABL,
        CBD,
        FINE_TUNING,
        FINE_PRUNING,
        NAD,
        FT_SAM,
        ACTIVATION_CLUSTERING,
        SPECTRAL_SIGNATURES,
        SCAN,
        AGPD,
        VBD,
        STRIP,
        ANP,
        I_BAU,
        NEURAL_CLEANSE,
        FKD,
        ROBUST_KD,
        LOGIT_DISTILLATION,
        ATTENTION_TRANSFER,
        TA_KD_STUDENT,
    )
}  # fmt: skip
DEFENSES: Registry[Defense] = Registry("defense", _OWN, of_type(Defense, "bdjax.defenses.contract.Defense"))


def find_defense(name: str) -> Defense:
    """The defense with this name.

    Raises:
        InputError: no defense has this name.
    """
    check_choice("defense", name, DEFENSES)
    return DEFENSES[name]
