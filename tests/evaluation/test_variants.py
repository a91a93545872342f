import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.evaluation.variants import read_attack, read_defense
from bdjax.types import Dataset

CLASSES, ROWS, SHAPE = 4, 40, (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (ROWS, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(ROWS) % CLASSES).astype(np.int32)
TRAIN = Dataset(IMAGES, LABELS, CLASSES, "mine", "a test")
TACT = "tact:poison_rate=0.1:cover_rate=0.1"  # an attack with cover rows


class TestReadAttack:
    def test_none_is_the_training_set_as_it_is(self):
        attack = read_attack("none", TRAIN, 2)
        assert (attack.plan, attack.suppression, attack.title) == (None, 0.0, "no attack")

    def test_name_and_settings(self):
        attack = read_attack("badnets:poison_rate=0.2:target=3:suppression=20", TRAIN, 0)
        (part,) = attack.plan.parts
        assert part.settings.poison_rate == 0.2 and part.rule.name == "all-to-one, target 3"
        assert (attack.target, attack.suppression) == (3, 20.0) and isinstance(attack.suppression, float)
        assert attack.title == "BadNets (poison rate 0.2, target 3, suppression 20)"
        assert read_attack("badnets", TRAIN, 1).target == 1

    def test_label_noise_is_a_setting_of_any_attack_and_of_none(self):
        none = read_attack("none:label_noise=0.1", TRAIN, 2)
        assert (none.plan, none.label_noise, none.suppression) == (None, 0.1, 0.0)
        assert none.title == "no attack (label noise 0.1)"
        badnets = read_attack("badnets:label_noise=1:poison_rate=0.2", TRAIN, 0)
        assert badnets.label_noise == 1.0 and isinstance(badnets.label_noise, float)
        assert badnets.plan.parts[0].settings.poison_rate == 0.2 and badnets.title.startswith("BadNets (label noise 1")
        assert read_attack("badnets", TRAIN, 0).label_noise == read_attack("none", TRAIN, 0).label_noise == 0

    def test_label_rule(self):
        assert read_attack("sig:label_rule=all_to_one", TRAIN, 0).plan.parts[0].rule.name == "all-to-one, target 0"
        assert read_attack("sig", TRAIN, 0).plan.parts[0].rule.name == "clean-label, target 0"

    def test_settings_of_a_hybrid_go_to_each_part(self):
        plan = read_attack("badnets+blended:poison_rate=0.05:target=1", TRAIN, 0).plan
        assert [part.settings.poison_rate for part in plan.parts] == [0.05, 0.05]
        assert {part.rule.name for part in plan.parts} == {"all-to-one, target 1"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("nothing", "'nothing' is not one of"),
            ("none:target=1", "none has no settings except label_noise"),
            ("none:label_noise=0.1:target=1", "none has no settings except label_noise"),
            ("none:label_noise=-0.1", "label_noise -0.1 should be a share from 0 to 1"),
            ("badnets:label_noise=1.1", "label_noise 1.1 should be a share from 0 to 1"),
            ("badnets:label_noise=nan", "label_noise 'nan' should be a share from 0 to 1"),
            ("badnets:label_noise=1e999", "label_noise inf should be a share from 0 to 1"),
            ("badnets:label_noise=some", "label_noise 'some' should be a share from 0 to 1"),
            ("badnets:label_noise=True", "label_noise True should be a share from 0 to 1"),
            ("badnets:colour=1", "has no setting 'colour'"),
            ("badnets:poison_rate", "should be setting=value"),
            ("badnets:target=4", "target 4 is not a class; classes are 0 to 3"),
            ("badnets:target=-1", "target -1 is not a class"),
            ("badnets:target=cat", "target 'cat' is not a class"),
            ("badnets:target=True", "target True is not a class"),
            ("badnets:suppression=-1", "suppression -1 should be a number"),
            ("badnets:suppression=much", "suppression 'much' should be a number"),
            ("badnets:suppression=1e999", "suppression inf should be a number"),
            ("badnets:suppression=True", "suppression True should be a number"),
            ("badnets:label_rule=clean_label", "is not one of"),
            ("badnets:poison_rate=0.001", "rate"),
            ("wanet", "controls the training itself"),
            ("hidden_trigger", "fine-tunes a clean model"),
            ("badnets+wanet", "can be combined"),
        ],
    )
    def test_errors_are_one_line(self, text, message):
        with pytest.raises(InputError, match="^[^\n]*$") as raised:
            read_attack(text, TRAIN, 0)
        assert message in str(raised.value)


class TestReadAttackOnModels:
    def read(self, text):
        return read_attack(text, TRAIN, 0, defender_gets="model")

    @pytest.mark.parametrize("text", ["wanet", "hidden_trigger", "badnets:target=2", "latent_backdoor"])
    def test_whoever_hands_over_a_model_may_train_it(self, text):
        attack = self.read(text)
        assert attack.name == attack.plan.name == text and attack.suppression == 0
        assert attack.target == (2 if "target" in text else 0)

    def test_variants_of_an_attack_have_plans_of_their_own(self):
        plans = [self.read(f"latent_backdoor:feature_weight={weight}").plan for weight in (0.5, 1.0)]
        assert plans[0].name != plans[1].name
        assert [plan.parts[0].settings.feature_weight for plan in plans] == [0.5, 1.0]

    def test_none_is_a_clean_teacher(self):
        attack = self.read("none")
        assert attack.plan is None and attack.title == "clean teacher"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("none:label_noise=0.1", "label_noise applies to training sets only"),
            ("badnets:suppression=2", "suppression applies to training sets only"),
            ("none:target=1", "none has no settings$"),
            ("nothing", "is not one of"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(InputError, match=message):
            self.read(text)


class TestReadChain:
    def test_each_part_has_its_settings(self):
        variant = read_defense("fine_tuning:epochs=5+fkd:student=wrn_16_1", "quick", "digits")
        assert variant.name == "fine_tuning:epochs=5+fkd:student=wrn_16_1" and variant.defense.name == "fine_tuning+fkd"
        assert variant.title == "FT (epochs 5), then FKD (student wrn_16_1)"
        first, second = variant.settings
        assert (first.epochs, second.student) == (5, "wrn_16_1")
        assert variant.defense.needs_with(variant.settings) == ("attacked model", "clean rows")

    def test_three_parts_and_what_any_of_them_needs(self):
        variant = read_defense("lfd+fine_tuning+robust_kd:select=oracle:thresholds=(0.1, 0.2)", "quick", "digits")
        assert (
            len(variant.settings) == 3
            and variant.title == "LfD, then FT, then RobustKD (select oracle, thresholds (0.1, 0.2))"
        )
        assert set(variant.defense.needs) == {"training set", "attacked model", "clean rows", "attacker's trigger"}

    def test_what_the_run_says_holds_where_the_text_does_not(self):
        common = {"student": "wrn_10_2", "nothing": 3}
        for text, expected in (("fkd", "wrn_10_2"), ("fkd:student=wrn_16_1", "wrn_16_1")):
            assert read_defense(text, "quick", "digits", common).settings.student == expected
        variant = read_defense("fine_tuning+fkd", "quick", "digits", common)
        assert variant.settings[1].student == "wrn_10_2" and variant.name == "fine_tuning+fkd"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("fine_tuning+nothing", "'nothing' is not one of"),
            ("fine_tuning+", "'' is not one of"),
            ("fine_tuning:colour=1+fkd", "has no setting 'colour'"),
            ("fine_tuning+fkd:divisor=-1.0", "divisor"),
            ("strip+fkd", "strip works at test time"),
        ],
    )
    def test_errors_are_those_of_the_parts(self, text, message):
        with pytest.raises(InputError, match=message):
            read_defense(text, "quick", "digits")


def test_defenses_keep_the_name_that_they_were_given():
    variant = read_defense("none", "quick", "digits")
    assert (variant.name, variant.title, variant.defense.name) == ("none", "no defense", "none")
    with pytest.raises(InputError, match="is not one of"):
        read_defense("nothing", "quick", "digits")
    with pytest.raises(InputError, match="has no setting 'alpha'"):
        read_defense("none:alpha=1", "quick", "digits")
