"""Checkpoints to the hub and back over its HTTP interface, and the errors when it cannot be reached."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub_stub import TOKEN, Hub
from huggingface_hub import constants
from processes import script

from checkpoints.checkpoint import make_metadata, open_checkpoint, read_metadata, read_tensors, save_tensors
from checkpoints.hub import HubError, resolve_to_file
from checkpoints.warm_start import warm_start
from experiment.config import AuxiliaryConfig, DataConfig, EvaluationConfig, SamplingFlags
from machine.checkpoint_folder import CheckpointError, list_checkpoints
from sampling.grids import read_weights_hash, save_grid
from sharing.model_card import card_files, format_sampling, model_card, to_half, without_paths, write_folder

PUSH, SAMPLE = script("scripts/push_to_hub.py"), script("sample.py")
REPO = "me/tiny-shapes"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub, of its own HTTP library


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module", autouse=True)
def asked(hub):
    """Make huggingface_hub use the stub, as HF_ENDPOINT and HF_TOKEN would; it has read those at import."""
    resolve = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def pushed(folder, hub):
    """A finished run with scores, uploaded."""
    scores = {
        "scores": {"fid": {"value": 12.346, "std": 0.5, "reason": None}},
        "num_samples": 400,
        "num_reference": 400,
        "extractor": "inception",
        "extractor_sha256": "abc123",
        "reference": {"source": "shapes", "split": "test"},
        "samples": {"sampler": "ddpm", "num_steps": 3, "guidance_scale": 1.5, "seed": 0},
        "commit": "f00d",
    }
    path = folder / "runs" / "tiny" / "scores.json"
    path.write_text(json.dumps(scores))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        PUSH.main(PUSH.PushConfig(checkpoint=str(folder / "runs" / "tiny"), repo=REPO, license="mit"))
    path.unlink()
    return said.getvalue()


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def test_upload_holds_weights_card_and_what_the_card_shows(pushed, hub, folder):
    files = hub.repos[REPO]
    assert {"ema.safetensors", "config.yaml", "scores.json", "README.md", "loss.png"} <= set(files)
    weights = folder / "runs" / "tiny" / "checkpoints" / "00000004" / "ema.safetensors"
    assert files["ema.safetensors"] == weights.read_bytes()
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    for said in (
        "averaged weights after 4 steps",
        "10 classes (circle,",
        "the embedded procedural shapes",
        "| fid   | 12.35 ± 0.5 |",
        "400 samples against 400 images",
        "sha256 `abc123`",
        "sampler ddpm, num_steps 3, guidance_scale 1.5, seed 0",
        "![Loss](loss.png)",
        f"python sample.py --checkpoint hf://{REPO}",
        "## Limits",
    ):
        assert said in card


def test_pushing_unscored_weights_removes_old_scores_and_keeps_other_files(pushed, hub, folder, monkeypatch):
    monkeypatch.setitem(hub.repos, "me/again", {**hub.repos[REPO], "notes.txt": b"the user's"})
    PUSH.main(PUSH.PushConfig(checkpoint=str(folder / "runs" / "tiny"), repo="me/again"))
    assert hub.repos[REPO].keys() ^ hub.repos["me/again"].keys() == {"scores.json", "notes.txt"}
    assert b"Not scored yet." in hub.repos["me/again"]["README.md"]


def test_no_token_is_printed_or_stored(pushed, hub, tmp_path_factory):
    assert f"Bearer {TOKEN}" in hub.tokens
    assert REPO in pushed
    assert TOKEN not in pushed
    assert not any(TOKEN.encode() in content for content in hub.repos[REPO].values())
    for place in tmp_path_factory.getbasetemp().rglob("*"):
        assert not (place.is_file() and place.stat().st_size < 10**6 and TOKEN.encode() in place.read_bytes()), place


def test_a_name_on_the_hub_works_where_a_path_does(pushed, hub, here):
    checkpoint = open_checkpoint(f"hf://{REPO}")
    assert (checkpoint.spec.name, checkpoint.step, checkpoint.run.resolve()) == (
        "XSwin",
        4,
        Path("runs/me--tiny-shapes").resolve(),
    )
    model = checkpoint.load_model()
    fresh = checkpoint.spec.build()
    assert f"--init_from hf://{REPO}: took" in warm_start(fresh, f"hf://{REPO}")
    assert torch.equal(fresh.head.weight, model.head.weight)
    downloads = sum(call.startswith("GET") for call in hub.calls)
    assert resolve_to_file(f"hf://{REPO}@main", "ema.safetensors").is_file()
    open_checkpoint(f"hf://{REPO}")
    assert sum(call.startswith("GET") for call in hub.calls) == downloads + 1  # of the revision's own folder


def test_sample_draws_from_the_hub(pushed, here):
    settings = {"classes": ["circle"], "num_per_class": 1}
    SAMPLE.main(SAMPLE.SampleConfig(checkpoint=f"hf://{REPO}", **settings))
    weights = read_metadata(Path("runs/me--tiny-shapes/ema.safetensors"))["weights_sha256"]
    assert read_weights_hash(Path("runs/me--tiny-shapes/samples.png")) == weights


def test_without_a_network_what_was_downloaded_before_serves(pushed, hub, here, monkeypatch):
    first = resolve_to_file(f"hf://{REPO}", "ema.safetensors")
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    assert resolve_to_file(f"hf://{REPO}", "ema.safetensors") == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries five times
    with pytest.raises(HubError, match=r"^hf://me/other: no network, and runs/me--other does not hold it from before"):
        open_checkpoint("hf://me/other")


def test_what_the_hub_does_not_have_is_said_in_one_line(pushed, hub, here):
    hub.repos["me/empty"] = {}
    for path, words in {
        "hf://me/none": "no such repository, or it is private",
        "hf://me/empty": "the hub does not serve ema.safetensors of it",
        f"hf://{REPO}@v9": "the hub does not serve",
        "hf://none": "not the name of a repository; write hf://owner/name",
        "hf://me/../etc": "not the name of a repository",
    }.items():
        with pytest.raises(HubError, match=words) as raised:
            open_checkpoint(path)
        assert "\n" not in str(raised.value)


def test_a_push_that_is_refused_ends_in_one_line(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"--repo me/tiny-shapes: the hub did not take it .*hf auth login") as raised:
        PUSH.main(PUSH.PushConfig(checkpoint=str(folder / "runs" / "tiny"), repo=REPO))
    assert "\n" not in str(raised.value)
    assert "hf_wrong" not in str(raised.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="--repo me/tiny-shapes: the hub did not take it"):
        PUSH.main(PUSH.PushConfig(checkpoint=str(folder / "runs" / "tiny"), repo=REPO))


def test_a_dry_run_uploads_nothing(folder, tmp_path, hub, here):
    calls = len(hub.calls)
    run_folder = str(folder / "runs" / "tiny")
    PUSH.main(PUSH.PushConfig(checkpoint=run_folder, repo=REPO, dry_run=tmp_path / "card"))
    assert "Not scored yet" in (tmp_path / "card" / "README.md").read_text()
    assert (tmp_path / "card" / "ema.safetensors").is_file()
    assert len(hub.calls) == calls
    before = (folder / "runs" / "tiny" / "config.yaml").read_bytes()
    with pytest.raises(FileExistsError, match=r"--dry_run .*tiny is not empty; give another folder or delete it"):
        PUSH.main(PUSH.PushConfig(checkpoint=run_folder, repo=REPO, dry_run=Path(run_folder)))
    assert (folder / "runs" / "tiny" / "config.yaml").read_bytes() == before
    with pytest.raises(ValueError, match="--repo tiny: give owner/name"):
        PUSH.main(PUSH.PushConfig(checkpoint=run_folder, repo="tiny"))


def test_half_precision_weights_are_half_the_size_and_load_as_float32(folder, tmp_path):
    run_folder = str(folder / "runs" / "tiny")
    PUSH.main(PUSH.PushConfig(checkpoint=run_folder, repo=REPO, half=True, dry_run=tmp_path))
    whole, half = open_checkpoint(run_folder), open_checkpoint(tmp_path)
    assert half.path.stat().st_size < 0.6 * whole.path.stat().st_size
    ours, theirs = half.load_model().state_dict(), whole.load_model().state_dict()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)  # in float32
    with pytest.raises(ValueError, match=r"--half true: norm.running_var has numbers beyond float16's 65504"):
        to_half({"norm.running_var": torch.tensor([1.0, 1e5]), "norm.num_batches": torch.tensor(100_000)})


def test_nothing_that_is_published_names_a_folder_of_this_machine(folder, tmp_path):
    run, home = tmp_path / "run", "/home/anna/secret"
    (run / "samples").mkdir(parents=True)
    tiny = open_checkpoint(folder / "runs" / "tiny")
    config = replace(
        tiny.config,
        autoencoder=f"{home}/vae",
        data=DataConfig(path=f"{home}/cats.zip", cache="../secret/cache", image_size=32),
        evaluation=EvaluationConfig(extractor=f"{home}/colors.pt2", weights_path="~/secret/w.pt"),
        auxiliary=[AuxiliaryConfig("perceptual", 1.0, network=f"{home}/vgg.pt2")],
    )
    weights = tiny.load_model().state_dict()
    identity = {**tiny.identity, "train": {**tiny.identity["train"], "source": f"{home}/cats.zip"}}
    save_tensors(
        weights, run / "ema.safetensors", make_metadata(config, 4, identity, spec=tiny.spec, classes=tiny.classes)
    )
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    record = {"scores": {}, "num_samples": 1, "num_reference": 1, "extractor": "c", "extractor_sha256": "0"}
    record |= {"samples": {"checkpoint": "secret/run", "step": 4}, "reference": {"source": r"C:\\secret\\cats.zip"}}
    (run / "scores.json").write_text(json.dumps(record))
    PUSH.main(PUSH.PushConfig(checkpoint=str(run), repo=REPO, dry_run=tmp_path / "card"))
    for path in (tmp_path / "card").iterdir():
        assert b"secret" not in path.read_bytes(), path
        assert b"anna" not in path.read_bytes(), path
    published = open_checkpoint(tmp_path / "card")
    assert (published.config.data.path, published.config.model) == ("cats.zip", "XSwin")
    assert torch.equal(published.load_model().head.weight, weights["head.weight"])
    assert without_paths({"classes": ["/m/01g"], "path": "/m/01g"}) == {"classes": ["/m/01g"], "path": "01g"}
    assert without_paths({"autoencoder": "stabilityai/sd-vae-ft-ema", "model": "DiT-S/2"}) == {
        "autoencoder": "stabilityai/sd-vae-ft-ema",
        "model": "DiT-S/2",
    }


def test_a_card_shows_no_scores_or_samples_of_other_weights(folder, tmp_path):
    checkpoint = open_checkpoint(folder / "runs" / "tiny")
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "tiny", run)
    checkpoint = open_checkpoint(run)
    (run / "samples.png").touch()
    (run / "scores.json").write_text(json.dumps({"samples": {"step": 4}}))
    assert {"samples.png", "scores.json"} <= card_files(checkpoint).keys()
    os.utime(run / "samples.png", (0, 0))
    (run / "scores.json").write_text(json.dumps({"samples": {"step": 2}}))
    assert "scores.json" not in card_files(checkpoint)
    (run / "scores.json").write_text(json.dumps({"samples": {"step": 4, "weights_sha256": "of a step taken before"}}))
    assert "scores.json" not in card_files(checkpoint)
    assert card_files(checkpoint)["samples.png"].parent.name == "samples"  # the training's grid of this step
    older = open_checkpoint(run / "checkpoints" / "00000002")
    assert not {"samples.png", "scores.json"} & card_files(older).keys()
    (run / "scores-00000002.json").write_text(json.dumps({"samples": {"step": 2}}))
    assert card_files(older)["scores.json"].name == "scores-00000002.json"
    average = replace(checkpoint, path=run / "ema-0.08.safetensors")  # of the newest step, and of other weights
    (run / "scores.json").write_text(json.dumps({"samples": {"step": 4}}))
    assert not {"samples.png", "scores.json"} & card_files(average).keys()
    (run / "scores.json").write_text(json.dumps({"samples": {"step": 2}}))
    (run / "scores.json").write_text(json.dumps({"samples": {}}))
    assert "scores.json" in card_files(checkpoint)
    os.utime(run / "scores.json", (0, 0))
    assert "scores.json" not in card_files(checkpoint)


def test_a_card_is_not_published_with_other_weights(folder, tmp_path):
    """A training moves `checkpoints/best` while its card and weights are written."""
    steps = shutil.copytree(folder / "runs/tiny/checkpoints", tmp_path / "run/checkpoints")
    best, (first, second) = steps / "best", list_checkpoints(steps)
    best.symlink_to(first.name)
    checkpoint = open_checkpoint(best)
    best.unlink()
    best.symlink_to(second.name)
    with pytest.raises(CheckpointError, match=r"--checkpoint .*best.*: replaced while it was read"):
        write_folder(checkpoint, REPO, "mit", tmp_path / "card", half=True)


def test_a_card_shows_samples_by_whose_they_are_not_by_when_they_were_copied(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "tiny", run)
    checkpoint, picture = open_checkpoint(run), run / "samples.png"
    own = read_metadata(checkpoint.path)["weights_sha256"]
    for weights, time, shown in (("another's", 2**31, False), (own, 0, True)):
        save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), picture, columns=1, weights=weights)
        os.utime(picture, (time, time))
        assert (card_files(checkpoint).get("samples.png") == picture) is shown


def test_the_card_describes_its_own_weights(folder, tmp_path):
    """For an older checkpoint the card gives its own step, and for an average made after training its length."""
    checkpoint = open_checkpoint(folder / "runs" / "tiny" / "checkpoints" / "00000002")
    assert "\n2 steps of batches of" in model_card(checkpoint, REPO, "mit", {})
    assert "averaged at 0.99" in model_card(checkpoint, REPO, "mit", {})
    train = replace(checkpoint.config.train, adapter="lora")
    begun = replace(checkpoint, config=replace(checkpoint.config, init_from="/home/anna/other", train=train))
    assert "begun with the weights of `other`, of which lora alone and labels" in model_card(begun, REPO, "mit", {})
    weights, metadata = read_tensors(checkpoint.path), read_metadata(checkpoint.path)
    save_tensors(weights, tmp_path / "ema.safetensors", {**metadata, "sigma_rel": "0.08"})
    assert "Until step" not in model_card(checkpoint, REPO, "mit", {})
    history = [{"until": 1, "settings": {"optim.lr": 0.5}}]
    save_tensors(weights, tmp_path / "resumed.safetensors", {**metadata, "history": json.dumps(history)})
    resumed = model_card(open_checkpoint(tmp_path / "resumed.safetensors"), REPO, "mit", {})
    assert "\nUntil step 1: optim.lr 0.5.\n" in resumed
    card = model_card(open_checkpoint(tmp_path / "ema.safetensors"), REPO, "mit", {})
    assert "averaged by a power function of length 0.08" in card
    assert "averaged at" not in card


def test_a_card_says_how_scored_samples_were_drawn(folder):
    checkpoint = open_checkpoint(folder / "runs" / "tiny")
    own = checkpoint.identity["codec"]
    usual = {"sampler": "ddpm", "num_steps": 3, "guidance_scale": 1.5, "seed": 0}
    as_usual = {"spacing": "uniform", "guidance_interval": None, "sampler_args": {}, "labels": "balanced"}
    assert format_sampling(checkpoint, {**usual, **as_usual, "autoencoder": {**own, "autoencoder": "moved"}}) == usual
    others = {
        "guidance_checkpoint": "worse",
        "guidance_interval": [0.2, 5.0],
        "spacing": "trailing",
        "labels": "random",
    }
    decoder = {"autoencoder": {**own, "decoder_sha256": "another", "autoencoder": "mine"}}
    assert format_sampling(checkpoint, {**usual, **others, **decoder}) == {**usual, **others, "autoencoder": "mine"}


def test_a_card_says_how_its_picture_was_drawn(folder, tmp_path, monkeypatch):
    """With settings that differ from the checkpoint's, and no path of this machine."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "runs" / "tiny", tmp_path / "run")
    guide = str(tmp_path / "run" / "checkpoints" / "00000002")
    sampling = SamplingFlags(guidance_checkpoint=guide, guidance_scale=3.0)
    SAMPLE.main(SAMPLE.SampleConfig("run", classes=["circle"], num_per_class=1, seed=7, sampling=sampling))
    checkpoint = open_checkpoint("run")
    files = card_files(checkpoint)
    assert str(tmp_path).encode() not in files["samples.png"].read_bytes()
    card = " ".join(model_card(checkpoint, REPO, "mit", files).replace("\\", "").split())
    drawn = "num_steps 3, guidance_scale 3.0, seed 7, guidance_checkpoint 00000002"
    assert f"![Samples](samples.png) Drawn with sampler ddpm, {drawn}." in card
    (tmp_path / "run" / "samples.png").unlink()  # the grid of the training, with its own settings
    assert "Drawn with" not in model_card(checkpoint, REPO, "mit", card_files(checkpoint))


def test_names_that_users_choose_are_text_in_a_card(folder):
    checkpoint = open_checkpoint(folder / "runs" / "tiny")
    named = replace(
        checkpoint, classes=["<img src=x>", "[a](b)", "c\n# d"], config=replace(checkpoint.config, autoencoder="a`b")
    )
    card = model_card(named, REPO, "mit: {x}", {})
    assert r"3 classes (\<img src=x\>, \[a\](b), c \# d)" in card
    assert "autoencoder `` a`b ``" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit: {x}"
