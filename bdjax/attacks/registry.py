"""All attacks by name. To add an attack, write a new file and add it here; the contract test runs on every entry. Attacks of
installed plugins are found by themselves."""

from bdjax.attacks.adaptive import ADAPTIVE_BLEND, ADAPTIVE_PATCH
from bdjax.attacks.badnets import BADNETS, BADNETS_ALL_TO_ALL, BADNETS_GRID, BADNETS_WHITE, TACT
from bdjax.attacks.blended import BLENDED, BLENDED_PICTURE
from bdjax.attacks.bpp import BPP, BPP_OFFLINE
from bdjax.attacks.cheat_distillation import CKD, CKD_LOW_VARIANCE
from bdjax.attacks.composite import COMPOSITE
from bdjax.attacks.contract import Attack
from bdjax.attacks.hidden_trigger import HIDDEN_TRIGGER
from bdjax.attacks.input_aware import INPUT_AWARE, INPUT_AWARE_OFFLINE
from bdjax.attacks.issba import ISSBA
from bdjax.attacks.l2_invisible import L2_INVISIBLE
from bdjax.attacks.label_consistent import LABEL_CONSISTENT
from bdjax.attacks.label_flip import LABEL_FLIP
from bdjax.attacks.latent_backdoor import LATENT_BACKDOOR
from bdjax.attacks.narcissus import NARCISSUS
from bdjax.attacks.provider_triggers import CHECKERBOARD, NOISE, PROVIDER_BLEND, SOLID
from bdjax.attacks.refool import REFOOL
from bdjax.attacks.sig import SIG, SIG_STRIPED
from bdjax.attacks.trojan import TROJAN_SQUARE, TROJAN_WATERMARK
from bdjax.attacks.vbd_triggers import VBD_ATTACKS
from bdjax.attacks.wanet import WANET, WANET_OFFLINE
from bdjax.plugins import Registry, of_type
from bdjax.settings import check_choice

_OWN: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        # Data attacks with fixed triggers.
        BADNETS,
        BADNETS_WHITE,
        BADNETS_GRID,
        BADNETS_ALL_TO_ALL,
        TACT,
        *VBD_ATTACKS,
        SOLID,
        CHECKERBOARD,
        NOISE,
        PROVIDER_BLEND,
        BLENDED,
        BLENDED_PICTURE,
        ADAPTIVE_BLEND,
        ADAPTIVE_PATCH,
        COMPOSITE,
        WANET_OFFLINE,
        BPP_OFFLINE,
        LABEL_FLIP,
        # Clean-label attacks.
        SIG,
        SIG_STRIPED,
        REFOOL,
        LABEL_CONSISTENT,
        NARCISSUS,
        HIDDEN_TRIGGER,
        # Data attacks with trained triggers.
        TROJAN_SQUARE,
        TROJAN_WATERMARK,
        L2_INVISIBLE,
        ISSBA,
        INPUT_AWARE_OFFLINE,
        # Attackers who train the model.
        INPUT_AWARE,
        WANET,
        BPP,
        LATENT_BACKDOOR,
        CKD,
        CKD_LOW_VARIANCE,
    )
}
ATTACKS: Registry[Attack] = Registry("attack", _OWN, of_type(Attack, "bdjax.attacks.contract.Attack"))


def find_attack(name: str) -> Attack:
    """Look up an attack by name.

    Raises:
        InputError: there is no such attack.
    """
    check_choice("attack", name, ATTACKS)
    return ATTACKS[name]
