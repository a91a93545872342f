"""Every attack by name. Another one is a file of its own and its line here; the contract test walks this table."""

from bdjax.attacks.blended import BLENDED, BLENDED_PICTURE
from bdjax.attacks.contract import Attack
from bdjax.attacks.sig import SIG, SIG_STRIPED
from bdjax.attacks.wanet import WANET
from bdjax.errors import InputError

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        SIG,
        SIG_STRIPED,
        WANET,
        BLENDED,
        BLENDED_PICTURE,
    )
}


def find_attack(name: str) -> Attack:
    """The attack of that name.

    Raises:
        InputError: there is none.
    """
    if name not in ATTACKS:
        raise InputError(f"attack {name!r} is not one of {', '.join(ATTACKS)}")
    return ATTACKS[name]
