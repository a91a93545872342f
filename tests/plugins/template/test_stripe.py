from bdjax_stripe import STRIPE

from bdjax.testing import check_attack


def test_the_attack_keeps_the_contract():
    check_attack(STRIPE)
