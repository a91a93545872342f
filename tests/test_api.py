import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import bdjax
from bdjax import api
from bdjax.datasets.digits import load_digits
from bdjax.defenses.neural_cleanse import Triggers
from bdjax.defenses.undefended import run as undefended_run
from bdjax.evaluation.control_networks import Audit
from bdjax.evaluation.model_audit import Measured
from bdjax.testing.tiny_network import make_tiny
from bdjax.training.member import TrainConfig
from bdjax.types import Detection

ROOT = pathlib.Path(__file__).parents[1]
KEY = jax.random.key(0)
CLASSES = 4
MODEL = make_tiny(CLASSES)


def digits(start: int, stop: int) -> bdjax.Dataset:
    """Rows of the first four classes."""
    train = load_digits((), False).train
    which = np.flatnonzero(train.labels < CLASSES)[start:stop]
    return bdjax.dataset(train.images[which], train.labels[which], CLASSES)


TRAIN, CLEAN, TEST = digits(0, 96), digits(96, 136), digits(136, 200)


@pytest.fixture(scope="module")
def bad():
    return bdjax.poison("badnets", TRAIN, KEY, target=1, poison_rate=0.2)


@pytest.fixture(scope="module")
def victim(bad):
    return bdjax.train(MODEL, bad.data, KEY, epochs=2, batch_size=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def three(bad):
    return bdjax.train(MODEL, bad.data, KEY, epochs=2, batch_size=32, learning_rate=1e-2, seeds=3)


def refused(message: str, call, *arguments, **settings) -> None:
    """The call fails with one line that matches the message."""
    with pytest.raises(bdjax.InputError, match=message) as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)


class TestPackage:
    def test_public_names_are_there_and_listed(self):
        assert set(bdjax.__all__) == set(api.__all__) and set(bdjax.__all__) <= set(dir(bdjax))
        assert all(getattr(bdjax, name) is getattr(api, name) for name in bdjax.__all__)
        with pytest.raises(AttributeError, match="no attribute 'defence'"):
            _ = bdjax.defence

    def test_importing_brings_no_report_and_no_command_line(self):
        heavy = (
            "'matplotlib', 'tyro', 'jinja2', 'tensorflow_datasets', 'bdjax.reporting', 'bdjax.run', 'bdjax.workflows'"
        )
        program = (
            "import sys, bdjax; assert 'jax' not in sys.modules and bdjax.__version__; bdjax.defend; "
            f"assert not {{{heavy}}} & set(sys.modules), set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class TestDataset:
    def test_images_are_scaled_if_asked_for(self):
        data = bdjax.dataset(TRAIN.images, TRAIN.labels, image_size=12)
        assert data.images.shape[1:] == (12, 12, 1) and data.original_sizes == {(8, 8): len(TRAIN)}
        refused("image_size 4 is not at least 8", bdjax.dataset, TRAIN.images, TRAIN.labels, image_size=4)
        scaled = bdjax.load("digits", options=bdjax.ReadOptions(image_size=12)).train
        assert scaled.image_shape == (12, 12, 1)

    def test_arrays_become_rows_that_can_be_chosen(self):
        data = bdjax.dataset(TRAIN.images, TRAIN.labels, class_names=("zero", "one", "two", "three"))
        assert (data.num_classes, data.name, data.labels.dtype) == (4, "data", np.int32)
        mask = data.labels == 2
        for rows in (mask, np.flatnonzero(mask), np.flatnonzero(mask).tolist()):
            assert (data[rows].labels == 2).all() and len(data[rows]) == mask.sum()
        np.testing.assert_array_equal(data[10:20].images, data.images[10:20])
        with pytest.raises(TypeError, match="a slice, a mask or a list of indices"):
            data[3]

    def test_selected_rows_keep_their_fields(self, bad):
        poisoned = bad.data[bad.data.is_poisoned]
        assert (
            isinstance(poisoned, bdjax.PoisonedDataset) and poisoned.is_poisoned.all() and (poisoned.labels == 1).all()
        )

    @pytest.mark.parametrize(
        ("images", "labels", "more", "message"),
        [
            (TRAIN.images / 255, TRAIN.labels, {}, "images are float64 .* must be uint8"),
            (TRAIN.images[..., 0], TRAIN.labels, {}, r"must be uint8 \[rows, height, width, channels\]"),
            (TRAIN.images, TRAIN.labels[:-1], {}, "has 96 images and 95 labels"),
            (TRAIN.images, TRAIN.labels + 0.5, {}, "labels are float64"),
            (TRAIN.images, TRAIN.labels, {"num_classes": 3}, r"row \d+ has label 3; labels must be in 0..2"),
            (TRAIN.images[:0], TRAIN.labels[:0], {}, "contains no images"),
            (TRAIN.images, TRAIN.labels, {"class_names": ("one",)}, "has 1 class names for 4 classes"),
        ],
    )
    def test_other_arrays_are_refused(self, images, labels, more, message):
        refused(f"^dataset data: .*{message}", bdjax.dataset, images, labels, **more)


class TestPoison:
    def test_the_target_is_given_once(self, bad):
        assert bad.data.is_poisoned.sum() == 19 and (bad.data.labels[bad.data.is_poisoned] == 1).all()
        assert bad.trigger.target == 1 and bad.trigger.rule.name == "all-to-one, target 1"
        np.testing.assert_array_equal(TRAIN.images[~bad.data.is_poisoned], bad.data.images[~bad.data.is_poisoned])

    def test_the_trigger_puts_on_images_what_poisoned_rows_have(self, bad):
        rows = bad.data.is_poisoned
        np.testing.assert_array_equal(bad.trigger(TRAIN.images[rows]), bad.data.images[rows])
        refused("a trigger takes uint8", bad.trigger, TRAIN.images / 255)

    def test_a_trigger_that_depends_on_the_class_needs_labels(self):
        trigger = bdjax.poison("white_square_all_to_all", TRAIN, KEY, poison_rate=0.2).trigger
        refused("depends on the class", trigger, TEST.images)
        assert trigger(TEST.images, TEST.labels).shape == TEST.images.shape

    def test_settings_depend_on_like_and_not_on_the_name_of_the_data(self):
        named = dataclasses.replace(TRAIN, name="digits")
        plain, same, adapted = (
            bdjax.poison("tact", data, KEY, **options).settings
            for data, options in ((TRAIN, {}), (named, {}), (TRAIN, {"like": "digits"}))
        )
        assert plain == same != adapted and adapted.poison_rate == 0.05

    def test_attackers_who_need_a_clean_network_get_it(self, victim):
        bad = bdjax.poison("label_consistent", TRAIN, KEY, poison_rate=0.1, clean_model=victim, like="digits", steps=2)
        assert bad.data.is_poisoned.sum() == 9
        refused("needs a clean network: pass clean_model=", bdjax.poison, "label_consistent", TRAIN, KEY)

    @pytest.mark.parametrize(
        ("attack", "options", "message"),
        [
            ("badnet", {}, "attack 'badnet' is not one of .*badnets"),
            ("wanet", {}, "trains the network itself; attacks that poison data are .*badnets"),
            ("badnets", {"colour": 1}, "no setting 'colour'; it has "),
            ("badnets", {"target": 4}, "target 4 is not a class"),
            ("badnets", {"label_rule": "clean_label"}, "label rule clean_label is not one of all_to_one"),
            ("badnets", {"poison_rate": 0.001}, "less than one row"),
            ("badnets", {"like": "numbers"}, "poison: like 'numbers' is not one of digits"),
        ],
    )
    def test_invalid_input_is_refused(self, attack, options, message):
        refused(message, bdjax.poison, attack, TRAIN, KEY, **options)

    def test_rows_that_are_poisoned_are_not_poisoned_again(self, bad):
        refused("19 rows of the data are already poisoned", bdjax.poison, "badnets", bad.data, KEY)
        refused("data is a tuple; it must be a Dataset", bdjax.poison, "badnets", (TRAIN.images, TRAIN.labels), KEY)


class TestTrain:
    def test_a_network_predicts_from_bytes_and_from_floats(self, victim):
        logits = victim.predict(TEST.images)
        assert logits.shape == (64, CLASSES) and logits.dtype == np.float32
        np.testing.assert_allclose(victim(TEST.images / 255), logits, rtol=1e-5, atol=1e-5)
        assert victim.history["loss"].shape == (2,) and victim.seeds is None
        expected = MODEL.apply(victim.variables, TEST.images.astype(np.float32) / 255, train=False).logits
        np.testing.assert_allclose(expected, logits, rtol=1e-4, atol=1e-4)

    def test_several_seeds_are_the_same_call(self, victim, three):
        assert three.predict(TEST.images).shape == (3, 64, CLASSES) and three.history["loss"].shape == (3, 2)
        first, second, _ = three.predict(TEST.images)
        np.testing.assert_allclose(first, victim.predict(TEST.images), rtol=1e-5, atol=1e-5)
        assert np.abs(first - second).max() > 1e-2

    def test_a_network_continues_the_training_of_another(self, victim):
        after = bdjax.train(victim, CLEAN, KEY, epochs=1, learning_rate=1e-9)
        np.testing.assert_allclose(after.predict(TEST.images), victim.predict(TEST.images), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            ("resnet", {}, "unknown model 'resnet'; models are .*resnet10"),
            (3, {}, "model is a int; it must be a name in MODELS"),
            (make_tiny(7), {}, "has 7 classes; the data has 4"),
            (MODEL, {"epochs": 0}, "train: epochs 0 is not at least 1"),
            (MODEL, {"schedule": "linear"}, "train: schedule 'linear' is not one of plateau, cosine"),
            (MODEL, {"rate": 0.1}, "train has no setting 'rate'; it has "),
            (MODEL, {"seeds": 0}, "seeds 0 is not at least 1"),
        ],
    )
    def test_invalid_input_is_refused(self, model, options, message):
        refused(message, bdjax.train, model, TRAIN, KEY, **options)

    def test_other_images_are_refused(self, victim):
        for images in (TEST.images[..., 0], TEST.images[:, :4], TEST.images.astype(np.int64)):
            refused(r"this network takes uint8, or floats in 0..1, of shape \[rows, 8, 8, 1\]", victim.predict, images)


class TestLoadAndSave:
    def network(self, seeds=None):
        """Random weights; nothing is trained."""
        model, count = api.make_model("lenet", 3), seeds or 1
        shapes = api.ensemble.trained_like(model, (8, 8, 1), count, 0).variables
        draw = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
        variables = variables if seeds else jax.tree.map(lambda leaf: leaf[0], variables)
        return api.Network(model, variables, (8, 8, 1), 64, seeds)

    @pytest.mark.parametrize("seeds", [None, 2])
    def test_a_network_comes_back_as_it_was(self, tmp_path, seeds):
        network = self.network(seeds)
        bdjax.save_model(network, tmp_path / "lenet", ["a", "b", "c"])
        found = bdjax.load_model(tmp_path / "lenet")
        assert (found.seeds, found.image_shape, found.width) == (seeds, (8, 8, 1), 64)
        for ours, theirs in zip(*(jax.tree.leaves(of.variables) for of in (network, found)), strict=True):
            assert np.array_equal(ours, theirs)

    def test_a_file_of_weights_needs_its_architecture(self, tmp_path):
        bdjax.save_model(self.network(), tmp_path)
        path = tmp_path / "model.safetensors"
        found = bdjax.load_model(path, "lenet", (8, 8, 1), mean=[0.5], std=[0.25])
        assert found.model.num_classes == 3 and found.model.architecture.mean == (0.5,)
        single = bdjax.load_model(path, "lenet", (8, 8, 1), mean=0.5, std=0.25)
        assert single.model.architecture == found.model.architecture
        for arguments, options, message in [
            ((path,), {}, "needs the architecture and the image shape"),
            ((path, "lenet", (8, 8, 1)), {"mean": [0.5]}, "give both mean and std"),
            ((path, "lenet", (8, 8, 1)), {"num_classes": 4}, "the network has 3 classes"),
            ((path, "lenet", (8, 8, 1)), {"mean": "a", "std": 1}, "mean a and std 1 must be numbers"),
            ((tmp_path, "lenet"), {}, "is the folder of a saved model, which needs no other argument"),
            ((tmp_path,), {"mean": np.zeros(3)}, "is the folder of a saved model, which needs no other argument"),
        ]:
            with pytest.raises(bdjax.InputError, match=message):
                bdjax.load_model(*arguments, **options)

    def test_what_cannot_be_saved(self, tmp_path):
        network = self.network()
        pruned = dataclasses.replace(network, model=network.model._replace(architecture=None))
        for saved, names, message in [
            (pruned, (), "no network that a file can describe"),
            (network, ["a"], "1 class names for 3 classes"),
            (network.model, (), "must be a trained network"),
        ]:
            with pytest.raises(bdjax.InputError, match=message):
                bdjax.save_model(saved, tmp_path / "none", names)
        assert not (tmp_path / "none").exists()


class TestEvaluate:
    def test_any_callable_is_measured(self, bad):
        def always_one(images):
            assert images.dtype == np.float32 and images.max() <= 1
            return np.tile(np.eye(CLASSES)[1], (len(images), 1))

        measured = bdjax.evaluate(always_one, TEST, bad.trigger)
        share = float(np.mean(TEST.labels == 1))
        assert measured == (share, 1.0, 0.0) and str(measured) == f"cda={share:.3f} asr=1.000 r_acc=0.000"
        assert str(bdjax.evaluate(always_one, TEST)) == f"cda={share:.3f}"

    def test_several_networks_have_a_number_each(self, three, bad):
        measured = bdjax.evaluate(three, TEST, bad.trigger)
        assert all(values.shape == (3,) for values in measured) and "±" in str(measured)
        assert bdjax.evaluate(three, TEST).cda.shape == (3,)

    def test_what_cannot_be_measured_is_refused(self, victim, bad):
        def fail(images):
            raise ValueError("ours")

        refused("logits of shape", bdjax.evaluate, lambda images: np.zeros(len(images)), TEST)
        refused(r"evaluate: the model \(fail\) failed: ValueError: ours", bdjax.evaluate, fail, TEST)
        refused("evaluate: model is a str; it must map images to logits", bdjax.evaluate, "resnet10", TEST)
        refused("which knows its target", bdjax.evaluate, victim, TEST, lambda images: images)
        refused("none of the", bdjax.evaluate, victim, TEST[TEST.labels == 1], bad.trigger)


class TestDetectAndDefend:
    def test_a_detector_that_needs_the_attacked_network_trains_it_or_is_given_it(self, bad, victim):
        training = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2}
        options = {"percentile": 80.0}
        alone = bdjax.detect("spectral_signatures", bad.data, KEY, model=MODEL, training=training, **options)
        given = bdjax.detect("spectral_signatures", bad.data, KEY, victim=victim, **options)
        for found in (alone, given):
            assert found.flags.shape == (96,) and found.given == ("training set", "attacked model")
            assert found.settings.percentile == 80.0 and found.patterns == ()

    def test_the_ground_truth_is_ignored(self, bad, victim):
        fields = {field.name: getattr(bad.data, field.name) for field in dataclasses.fields(bdjax.Dataset)}
        found = [
            bdjax.detect("activation_clustering", data, KEY, victim=victim)
            for data in (bad.data, bdjax.Dataset(**fields))
        ]
        np.testing.assert_array_equal(found[0].flags, found[1].flags)

    def test_of_a_network_and_clean_rows(self, victim, bad):
        safe = bdjax.defend("fine_tuning", victim, KEY, clean=CLEAN, epochs=1, batch_size=32)
        assert safe.predict(TEST.images).shape == (64, CLASSES) and safe.flags is None
        assert safe.given == ("attacked model", "clean rows") and safe.settings.epochs == 1
        assert 0 <= bdjax.evaluate(safe, TEST, bad.trigger).asr <= 1

    def test_of_a_network_alone(self, victim, three):
        for network in (victim, three):
            same = bdjax.defend("none", network, KEY)
            assert same.given == ("attacked model",) and same.seeds == network.seeds
            np.testing.assert_array_equal(same.predict(TEST.images), network.predict(TEST.images))

    def test_several_seeds_are_the_same_call(self, three, bad):
        safe = bdjax.defend("fine_tuning", three, KEY, clean=CLEAN, epochs=1, batch_size=32)
        assert safe.seeds == 3 and safe.predict(TEST.images).shape == (3, 64, CLASSES)
        assert safe.facts["weight change"].shape == (3,)
        found = bdjax.detect("spectral_signatures", bad.data, KEY, victim=three)
        assert found.flags.shape == found.scores.shape == (3, 96)

    def test_settings_adapt_to_like_and_not_to_the_name_of_the_data(self, victim, monkeypatch):
        undefended = lambda defense, inputs, settings: undefended_run(inputs, settings)  # noqa: E731
        monkeypatch.setattr(api.contract, "run", undefended)  # nothing is trained
        options = {"clean": CLEAN, "epochs": 1, "batch_size": 32, "preset": "quick"}
        named = dataclasses.replace(CLEAN, name="digits")
        plain = bdjax.defend("fine_tuning", victim, KEY, **options | {"clean": named}).settings
        adapted = bdjax.defend("fine_tuning", victim, KEY, like="digits", **options).settings
        assert (plain.learning_rate, adapted.learning_rate) != (adapted.learning_rate,) * 2

    def test_the_function_behind_a_name(self):
        assert bdjax.DEFENSES["abm"].run.__module__ == "bdjax.defenses.abm"

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("abn", {}, "defense 'abn' is not one of none, lfd, abm"),
            ("abl", {"colour": 1}, "defense abl has no setting 'colour'; it has "),
            ("abl", {"isolation_rate": 2.0}, "defense abl: isolation_rate 2.0 is not "),
            ("abl", {"isolate": "oracle"}, None),
            ("nad", {}, "defense nad needs clean rows: pass clean="),
            ("abl", {"preset": "fast"}, "preset 'fast' is not one of paper, quick, strong"),
            ("abl", {"like": "numbers"}, "like 'numbers' is not one of digits"),
            ("abl", {"training": {"rate": 1}}, "training has no setting 'rate'"),
            ("abl+nad", {"alpha": 1}, "give the settings of a chain in its text"),
            ("abm", {"trigger": "attacker"}, "needs the attacker's trigger"),
        ],
    )
    def test_invalid_input_is_refused(self, name, options, message):
        refused(message or "needs the number of poisons", bdjax.defend, name, TRAIN, KEY, model=MODEL, **options)

    @pytest.mark.parametrize("name", ["fine_tuning", "fine_tuning+logit_distillation", "neural_cleanse"])
    def test_two_networks_that_correct_each_other_are_not_changed(self, name, victim):
        pair = dataclasses.replace(victim, model=MODEL._replace(parts=(MODEL, MODEL)))
        refused("two networks that correct each other cannot be trained", bdjax.defend, name, pair, KEY, clean=CLEAN)
        if name == "fine_tuning":  # without a defense, the pair comes back
            assert bdjax.defend("none", pair, KEY, clean=CLEAN).predict(TEST.images).shape == (64, CLASSES)

    @pytest.mark.parametrize("name", ["abm", "scan", "strip"])
    def test_no_network_like_two_that_correct_each_other_is_trained(self, name, victim):
        pair = dataclasses.replace(victim, model=MODEL._replace(parts=(MODEL, MODEL)))
        message = f"defense {name}.* trains a network like the victim; two networks that correct each other cannot be"
        refused(message, bdjax.defend, name, TRAIN, KEY, victim=pair, clean=CLEAN)
        if name == "scan":  # which only asks the victim
            assert bdjax.detect(name, TRAIN, KEY, victim=pair, clean=CLEAN).flags.shape == (len(TRAIN.labels),)

    def test_networks_and_rows_that_do_not_go_together_are_refused(self, victim, three):
        refused("abl needs the training set, not only a network", bdjax.defend, "abl", victim, KEY)
        refused("needs clean rows", bdjax.defend, "nad", victim, KEY)
        other = bdjax.dataset(np.zeros((4, 9, 9, 1), np.uint8), np.arange(4))
        refused("clean has 4 classes of images", bdjax.defend, "nad", victim, KEY, clean=other)
        refused("8, 1.; image_size=8 scales images to 8x8 pixels", bdjax.defend, "nad", victim, KEY, clean=other)
        refused("data is a Trained; it must be a Dataset", bdjax.detect, "scan", victim, KEY)
        refused("does not flag rows; detectors are ", bdjax.detect, "nad", TRAIN, KEY)
        refused("seeds 2: the given network has 3 seeds", bdjax.defend, "nad", three, KEY, clean=CLEAN, seeds=2)


class TestAuditModel:
    def test_arguments_that_do_not_fit_are_refused(self, victim):
        refused("clean is a ndarray; it must be a Dataset", bdjax.audit_model, victim, TRAIN.images, TEST, KEY)
        larger = bdjax.dataset(TEST.images, TEST.labels, CLASSES, image_size=12)
        refused("clean has 4 classes", bdjax.audit_model, victim, CLEAN, larger, KEY)
        refused(
            "controls 1 is not a whole number of at least 2", bdjax.audit_model, victim, CLEAN, TEST, KEY, controls=1
        )
        refused("random_triggers -1 is not a whole", bdjax.audit_model, victim, CLEAN, TEST, KEY, random_triggers=-1)
        refused("epochs", bdjax.audit_model, victim, CLEAN, TEST, KEY, search_epochs=0)
        refused("patience", bdjax.audit_model, victim, CLEAN, TEST, KEY, search_patience=0)

    def test_the_triggers_of_networks_that_could_not_be_tested_are_nan(self, three, monkeypatch):
        masks, patterns = np.ones((4, CLASSES, 8, 8, 1)), np.zeros((4, CLASSES, 8, 8, 1))
        models = [{"found": [], "reason": text} for text in ("", "untrained", "")]
        numbers = {"outcome": "nothing found", "models": models}
        measured = Measured(Triggers(masks, patterns), None, None, None)
        monkeypatch.setattr(api.control_networks, "audit", lambda *_: Audit(numbers, [0, 2], measured))
        found = bdjax.audit_model(three, CLEAN, TEST, KEY)
        assert found.masks.shape == found.patterns.shape == (3, CLASSES, 8, 8, 1)
        assert np.isnan(found.masks).any((1, 2, 3, 4)).tolist() == [False, True, False]
        assert found.reason == ["", "untrained", ""] and (found.patterns[[0, 2]] == 0).all()

    def test_two_networks_that_correct_each_other_are_a_black_box(self, victim, three, monkeypatch):
        pair, pairs = (
            dataclasses.replace(network, model=MODEL._replace(parts=(MODEL, MODEL))) for network in (victim, three)
        )
        numbers = {"outcome": "could not be tested", "models": [{"found": [], "reason": "stub"}]}
        given = []
        monkeypatch.setattr(api.control_networks, "audit", lambda *of: given.append(of) or Audit(numbers, [], None))
        for suspect in (victim, pair, pairs):
            bdjax.audit_model(suspect, CLEAN, TEST, KEY)
        white, black, several = (suspects for _, _, suspects in given)
        assert white.variables is not None and black.variables is None and several.variables is None
        assert black.asks[0](TEST.images).shape == (64, CLASSES) and len(several.titles) == len(several.asks) == 3
        np.testing.assert_allclose(
            [ask(TEST.images) for ask in several.asks], three.predict(TEST.images), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.slow
    def test_two_classes_are_decided_by_the_control_networks(self):
        train, test = bdjax.load("digits")
        train, test = (
            bdjax.dataset(rows.images[rows.labels < 2], rows.labels[rows.labels < 2], 2) for rows in (train, test)
        )
        training = {"epochs": 4, "batch_size": 32, "learning_rate": 1e-2}
        network = bdjax.train("vbd_4_4p", train, KEY, width=8, **training)
        few = {"controls": 2, "search_epochs": 2, "random_triggers": 10}
        found = bdjax.audit_model(network, train, test, KEY, **few, training=training)
        (model,) = found.numbers["models"]
        assert [entry["index"] for entry in model["classes"]] == [None, None]
        assert all(0 < entry["p_value"] <= 1 for entry in model["classes"]) and found.masks.shape == (2, 8, 8, 1)
        assert found.outcome in ("found", "nothing found", "could not be tested")
        assert found.numbers["planted"]["title"]

    def test_a_function_that_knows_nothing_could_not_be_tested(self):
        found = bdjax.audit_model(lambda images: np.zeros((len(images), CLASSES)), CLEAN, TEST, KEY)
        assert (found.outcome, found.found, found.masks) == ("could not be tested", (), None)
        assert "of the held-out rows correctly" in found.reason


class TestTaKd:
    OPTIONS = {"model": MODEL, "student": MODEL, "epochs": 2, "batch_size": 16}

    def test_callables_teach_an_aggregated_network_and_a_student(self, victim):
        trained = bdjax.ta_kd([victim, victim.predict], CLEAN, KEY, **self.OPTIONS)
        assert (
            trained.student.predict(TEST.images).shape == trained.aggregated.predict(TEST.images).shape == (64, CLASSES)
        )
        assert isinstance(trained.student.recipe, TrainConfig) and trained.student.history["loss"].shape == (2,)

    @pytest.mark.slow
    def test_several_seeds_are_the_same_call(self, victim):
        alone, three = (
            bdjax.ta_kd([victim, victim.predict], CLEAN, KEY, seeds=seeds, **self.OPTIONS).student.predict(TEST.images)
            for seeds in (None, 3)
        )
        assert three.shape == (3, 64, CLASSES)
        np.testing.assert_allclose(three[0], alone, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"aggregation": "mode"}, "ta_kd: aggregation 'mode' is not one of mean, median, trimmed_mean"),
            ({"aggregation": "trimmed_mean"}, "trim 1 at each end leaves no logits of 1 teachers"),
            ({"validation_share": 1.0}, "validation_share 1.0 is not at least 0 and below 1"),
            ({"heat": 4.0}, "ta_kd has no setting 'heat'; it has temperature"),
            ({"training": {"schedule": "linear"}}, "ta_kd: training: schedule 'linear' is not one of plateau"),
        ],
    )
    def test_invalid_input_is_refused(self, options, message):
        refused(message, bdjax.ta_kd, [lambda images: np.zeros((len(images), CLASSES))], CLEAN, KEY, **options)

    def test_teachers_with_other_logits_are_refused(self):
        refused("no teachers: TA-KD needs at least one", bdjax.ta_kd, [], CLEAN, KEY)
        refused(
            r"teacher 1 \(.*\) returned logits of shape", bdjax.ta_kd, [lambda images: np.zeros((3, 3))], CLEAN, KEY
        )


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    def tiny(name: str, num_classes: int, width: int):
        assert name in bdjax.MODELS and (num_classes, width) == (CLASSES, 8)
        return MODEL

    monkeypatch.setattr(api, "_network", tiny)  # with data of the shape of TEST, most of it is compiled already
    section = (ROOT / "README.md").read_text().split("## From Python\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    train, test = TRAIN, digits(200, 200 + 150 + len(TEST))
    templates = np.stack([train.images[train.labels == label].mean(0) for label in range(CLASSES)]) / 255
    templates = templates.reshape(CLASSES, -1)

    def nearest_mean(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) @ templates.T - 0.5 * (templates**2).sum(1)

    names = {"x_train": train.images, "y_train": train.labels, "x_test": test.images, "y_test": test.labels}
    names |= {"model_a": nearest_mean, "model_b": lambda images: 2 * nearest_mean(images)}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out.split()
    assert [word.split("=")[0] for word in printed] == ["cda", "asr", "r_acc"] * (len(printed) // 3) and printed
    for network in (names["victim"], names["safe"], names["ta"].student):
        assert network.predict(TEST.images).shape == (64, CLASSES)
    assert not list(tmp_path.iterdir())


class TestRowsThatAreTooFew:
    """Nothing is trained, so these take no time."""

    FEW = digits(0, 96)[np.arange(3)]

    def test_a_detector_says_why_and_has_no_flags(self):
        found = bdjax.detect("activation_clustering", self.FEW, KEY, model=MODEL)
        assert found.flags is None and found.scores is None
        assert found.not_tested.reason.startswith("needs at least 4 rows of a class")

    def test_a_detector_passes_its_warnings_on(self, monkeypatch):
        nothing = np.zeros((1, 3), bool)
        found = Detection(nothing, nothing.astype(np.float32), warnings=("its premise fails",))
        monkeypatch.setattr(api.contract, "detect", lambda *_: found)
        assert bdjax.detect("vbd", self.FEW, KEY, model=MODEL).warnings == ("its premise fails",)

    def test_a_defense_is_refused_in_one_line(self):
        two = bdjax.dataset(TRAIN.images[TRAIN.labels < 2], TRAIN.labels[TRAIN.labels < 2])
        refused(
            "defense neural_cleanse could not be tested: needs at least 3 classes",
            *(bdjax.defend, "neural_cleanse", two, KEY),
            clean=two,
        )
        refused(
            "spectral_signatures could not be tested: needs at least 3 rows",
            bdjax.defend,
            "spectral_signatures",
            self.FEW,
            KEY,
        )

    def test_what_was_not_read_and_clean_rows_that_are_suspect_rows_are_in_the_result(self, victim):
        unread = (bdjax.types.Unread("x.tif", "has a suffix that is not read"),)
        data = dataclasses.replace(TRAIN, unread=unread)
        found = bdjax.detect("scan", data[np.flatnonzero(TRAIN.labels < 2)], KEY, victim=victim, clean=TRAIN[:10])
        assert found.flags is None and "at least 3 classes" in found.not_tested.reason
        assert found.unread == unread and found.shared_rows == 10 - int(np.sum(TRAIN.labels[:10] >= 2))
