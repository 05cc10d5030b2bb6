"""Networks in files: torch.export's and TorchScript's formats, recognised by the suffix, and files that are neither."""

import contextlib
import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from processes import script
from scoring import score
from torch import nn

from autoencoder_training.autoencoder_config import LossConfig
from experiment.config import AuxiliaryConfig, EvaluationConfig
from metrics.classifier import SmallClassifier
from metrics.extractors import ExtractorError
from metrics.features import Extractor
from metrics.image_batches import image_batches
from metrics.perceptual import perceptual_network
from metrics.programs import class_names, load_exported, load_program, save_program

D = torch.export.Dim.DYNAMIC
IMAGES = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


def draw(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Colour(nn.Module):
    """Mean colours and their shares, computed by way of a device that the program stores."""

    def forward(self, images):
        tint = torch.arange(3, device=images.device, dtype=torch.float32)
        colour = images.float().mean(dim=(2, 3)) + tint + 1
        return colour, colour / colour.sum(dim=1, keepdim=True)


class Dropping(Colour):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        colour, shares = super().forward(images)
        return self.drop(colour), shares


class Two(nn.Module):
    def forward(self, images, scale):
        return images * scale


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same small classifier in both formats, and the classifier itself."""
    folder = tmp_path_factory.mktemp("programs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = SmallClassifier(5).eval()
    return classifier, classifier.save(folder / "small.pt"), classifier.save(folder / "small.pt2")


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return save_program(Colour(), IMAGES, tmp_path_factory.mktemp("colour") / "colour.pt2")


def export(module, *inputs, path, **settings):
    torch.export.save(torch.export.export(module, inputs, **settings), str(path))
    return path


# --- the two formats


def test_both_formats_give_the_same_features(files):
    classifier, script_file, exported_file = files
    script_module, exported = load_program(script_file), load_program(exported_file)
    for shape in [(1, 3, 8, 8), (7, 3, 33, 21), (2, 3, 64, 64)]:
        images = draw(*shape)
        with torch.no_grad():
            outputs = zip(classifier(images), script_module(images), exported(images), strict=True)
        for expected, of_script, of_exported in outputs:
            torch.testing.assert_close(of_script, expected)
            torch.testing.assert_close(of_exported, expected)


def test_both_formats_name_the_classes(files, tmp_path):
    classifier, *nameless = files
    for path in nameless:
        named = classifier.save(tmp_path / path.name, ["b", "ä", "a/c", " ", "1"])
        assert class_names(named) == ["b", "ä", "a/c", " ", "1"]
        assert class_names(path) == []
        assert load_program(named)(IMAGES)[1].shape == (len(IMAGES), 5)


def test_both_formats_give_the_same_scores(files):
    _, script_file, exported_file = files
    samples, reference = draw(20, 3, 16, 16), draw(25, 3, 20, 20, seed=1)
    found = [score(samples, reference, extractor=file).scores for file in (script_file, exported_file)]
    of_script, of_exported = ({name: one.value for name, one in scores.items() if one.value} for scores in found)
    assert {"frechet_distance[small]", "classifier_score[small]", "kernel_distance[small]"} <= of_script.keys()
    assert of_exported == pytest.approx(of_script, rel=1e-5)


def test_perceptual_networks_lead_gradients_to_images_of_any_size(files, tmp_path):
    classifier, *_ = files
    gradients = []
    for suffix in ("pt", "pt2"):
        network = perceptual_network(str(classifier.save_perceptual(tmp_path / f"features.{suffix}")))
        image = (torch.arange(2 * 3 * 20 * 28).reshape(2, 3, 20, 28) / 3360 - 0.5).requires_grad_()
        network(image).square().sum().backward()
        assert not any(parameter.requires_grad for parameter in network.parameters())
        gradients.append(image.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_an_exported_file_is_the_same_wherever_it_is_written(files, tmp_path):
    classifier, _, first = files
    second = classifier.save(tmp_path / "new" / "small.pt2")
    assert second.read_bytes() == first.read_bytes()  # and so are the hashes that scores name
    assert str(Path(__file__).parent.parent).encode() not in first.read_bytes()
    assert [found.name for found in second.parent.iterdir()] == ["small.pt2"]  # nothing half-written beside it


# --- modes, devices, precision


def test_exported_networks_accept_train_and_eval_mode(colour):
    network = load_exported(colour)
    images = draw(3, 3, 8, 8)
    for module in (network, network.eval(), network.train(), nn.Sequential(network).eval().requires_grad_(False)):
        torch.testing.assert_close(module(images)[0], Colour()(images)[0])


def test_devices_written_into_a_program_move_with_it(colour):
    holder = nn.Sequential(load_exported(colour)).to("meta")
    features, shares = holder(draw(3, 3, 8, 8).to("meta"))
    assert {features.device.type, shares.device.type} == {"meta"}
    assert torch.stack(load_exported(colour).cpu()(draw(3, 3, 8, 8))).isfinite().all()


def test_a_program_stays_in_the_precision_that_it_was_exported_in(tmp_path):
    class Half(Colour):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3, dtype=torch.bfloat16)

        def forward(self, images):
            colour, shares = super().forward(images)
            return self.mix(colour.to(torch.bfloat16)), shares

    module = Half().eval()
    path = save_program(module, IMAGES, tmp_path / "half.pt2")
    images = draw(3, 3, 8, 8)
    for network in (load_program(path), load_program(path).to(torch.float64)):
        assert torch.equal(network(images)[0], module(images)[0])
    assert Extractor(path)(image_batches(images), 3, progress=False).features.shape == (3, 3)


# --- programs that cannot serve


@pytest.mark.parametrize(
    ("module", "inputs", "settings", "words"),
    [
        (Colour(), (IMAGES,), {}, r"for batches of exactly 2: export it by .*dynamic_shapes"),
        (Dropping().train(), (IMAGES,), {"dynamic_shapes": ({0: D},)}, r"in training mode \(aten.dropout.*module.eval"),
        (Two(), (IMAGES, IMAGES), {}, r"other inputs than one batch of images"),
        (nn.Flatten(0), (torch.zeros(4, 3),), {}, r"other inputs than one batch of images"),
    ],
)
def test_a_program_for_other_inputs_is_refused(tmp_path, module, inputs, settings, words):
    path = export(module, *inputs, path=tmp_path / "other.pt2", **settings)
    with pytest.raises(ExtractorError, match=rf"^--extractor .*other\.pt2: it .*{words}") as caught:
        Extractor(path)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_than_a_program_was_exported_for(tmp_path):
    path = export(Colour(), IMAGES, path=tmp_path / "small.pt2", dynamic_shapes=({0: D},))
    assert score(draw(3, 3, 16, 16), draw(4, 3, 16, 16), extractor=path, metrics=["fid"])
    message = r"--extractor small: .*exported for a height of 16, and here it is 24: export it by .*2: D"
    with pytest.raises(ExtractorError, match=message):
        score(draw(3, 3, 24, 16), draw(4, 3, 24, 16), extractor=path)


def test_files_that_are_not_programs_are_refused_in_one_line(files, colour, tmp_path, capfd):
    _, script_file, _ = files
    (tmp_path / "cut.pt2").write_bytes(colour.read_bytes()[:-300])
    (tmp_path / "text.pt2").write_text("not a program")
    (tmp_path / "empty.pt2").touch()
    (tmp_path / "script.pt2").write_bytes(script_file.read_bytes())
    (tmp_path / "exported.pt").write_bytes(colour.read_bytes())
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt2")
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    for name, words in {
        "cut.pt2": "not a program of torch.export, or cut short",
        "text.pt2": "not a program of torch.export, or cut short",
        "empty.pt2": "not a program of torch.export, or cut short",
        "script.pt2": "this is a TorchScript file; let its name end in .pt",
        "exported.pt": "not a TorchScript file, or cut short (torch.export's files end in .pt2)",
        "weights.pt2": "not a program of torch.export",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"{name}: {words}")) as caught:
            load_program(tmp_path / name)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=re.escape(f"{name}: {words}")):
            perceptual_network(str(tmp_path / name))
    assert capfd.readouterr().err == ""


def test_a_damaged_graph_is_told_in_one_line(colour, tmp_path, capfd):
    path = altered(colour, tmp_path / "damaged.pt2", {"models/model.json": lambda content: content[:200]})
    with pytest.raises(ValueError, match=r"damaged\.pt2: torch .* cannot read it \(.*export it again") as caught:
        load_program(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


# --- pickles


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def altered(path, copy, changes, more=()):
    """Copy an archive with some records changed and others added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            change = changes.get(name.removeprefix(f"{root}/"), lambda content: content)
            new.writestr(name, change(old.read(name)))
        for name, content in dict(more).items():
            new.writestr(f"{root}/{name}", content)
    return copy


def test_nothing_in_a_program_is_unpickled_but_tensors(files, tmp_path):
    *_, plain = files
    sprung = tmp_path / "sprung"
    pickled = io.BytesIO()
    torch.save((Trap(sprung),), pickled)

    def as_pickle(config):
        return re.sub(rb'"use_pickle": ?false', b'"use_pickle": true', config, count=1)

    inputs = altered(plain, tmp_path / "inputs.pt2", {"data/sample_inputs/model.pt": lambda _: pickled.getvalue()})
    weights = altered(
        plain,
        tmp_path / "weights.pt2",
        {"data/weights/model_weights_config.json": as_pickle, "data/weights/weight_0": lambda _: pickled.getvalue()},
    )
    custom = altered(
        plain,
        tmp_path / "custom.pt2",
        {
            "data/constants/model_constants_config.json": lambda _: (
                b'{"config": {"a": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true, '
                b'"tensor_meta": null}}}'
            )
        },
        {"data/constants/opaque_obj_0": pickle.dumps(Trap(sprung))},
    )
    older = altered(plain, tmp_path / "older.pt2", {}, {"data/weights/model.pt": pickled.getvalue()})
    compiled = altered(plain, tmp_path / "compiled.pt2", {}, {"data/aotinductor/model/model.so": b"machine code"})
    for path, words in {
        inputs: "its example inputs are not only tensors",
        weights: "weight_0 in it is a pickle",
        custom: "opaque_obj_0",
        older: "it holds data/weights/model.pt, which a plain network does not need",
        compiled: "it holds data/aotinductor/model/model.so",
    }.items():
        with pytest.raises(ValueError, match=rf"{path.name}: .*{words}"):
            load_program(path)
    assert not sprung.exists()
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # which stumbles over what it has unpickled
        warnings.simplefilter("ignore")  # torch 2.9 has one of its own reader
        torch.export.load(str(inputs))
    assert sprung.exists()
    load_program(plain)


# --- what users are told


def test_every_flag_that_takes_a_program_says_that_it_is_one():
    evaluate, train_autoencoder = script("evaluate.py").EvaluateConfig, LossConfig
    entries = [
        (config.__name__, entry)
        for config in (EvaluationConfig, AuxiliaryConfig, evaluate, train_autoencoder)
        for entry in re.split(r"\n {8}(?=\w+: )", config.__doc__)
        if "TorchScript" in entry
    ]
    assert len(entries) == 4  # evaluate.py has EvaluationConfig's
    for name, entry in entries:
        words = " ".join(entry.split())
        assert "program" in words, (name, words)
        assert "run only what you trust" in words, (name, words)
        assert ".pt2" in words, (name, words)
