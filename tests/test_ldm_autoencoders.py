"""Autoencoders in latent-diffusion's format, VA-VAE among them: parity with the published layers, files, refusals."""

from typing import Any

import pytest
import torch
from processes import script
from torch.nn.functional import conv2d, group_norm, interpolate, pad, silu

from autoencoders.codec import AutoencoderError, create_codec
from autoencoders.ldm import from_ldm, read_statistics
from conversion import public_files
from experiment.build import open_split
from experiment.cli import parse
from experiment.config import DataConfig

SCRIPT = script("scripts/import_checkpoint.py")
WIDTHS, CHANNELS, DEPTH, ATTENDS = (32, 32, 64), 6, 2, {2}  # attention at the coarsest level, as in VA-VAE


def published(quant=True):
    """Random weights under latent-diffusion's names."""
    torch.manual_seed(0)
    weights = {}

    def convolution(name, of, to, size=3):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = (
            torch.randn(to, of, size, size) / of / size,
            torch.randn(to),
        )

    def norm(name, width):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + torch.randn(width) / 4, torch.randn(width) / 4

    def block(name, of, to):
        norm(f"{name}.norm1", of)
        norm(f"{name}.norm2", to)
        convolution(f"{name}.conv1", of, to)
        convolution(f"{name}.conv2", to, to)
        if of != to:
            convolution(f"{name}.nin_shortcut", of, to, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", width, width, 1)

    def middle(half):
        for number in (1, 2):
            block(f"{half}.mid.block_{number}", WIDTHS[-1], WIDTHS[-1])
        attention(f"{half}.mid.attn_1", WIDTHS[-1])

    convolution("encoder.conv_in", 3, WIDTHS[0])
    for level, width in enumerate(WIDTHS):
        for number in range(DEPTH):
            before = WIDTHS[max(0, level - 1)] if number == 0 else width
            block(f"encoder.down.{level}.block.{number}", before, width)
            if level in ATTENDS:
                attention(f"encoder.down.{level}.attn.{number}", width)
        if level < len(WIDTHS) - 1:
            convolution(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder")
    norm("encoder.norm_out", WIDTHS[-1])
    convolution("encoder.conv_out", WIDTHS[-1], 2 * CHANNELS)

    convolution("decoder.conv_in", CHANNELS, WIDTHS[-1])
    middle("decoder")
    before = WIDTHS[-1]
    for level in reversed(range(len(WIDTHS))):
        for number in range(DEPTH + 1):
            block(f"decoder.up.{level}.block.{number}", before, WIDTHS[level])
            before = WIDTHS[level]
            if level in ATTENDS:
                attention(f"decoder.up.{level}.attn.{number}", before)
        if level:
            convolution(f"decoder.up.{level}.upsample.conv", before, before)
    norm("decoder.norm_out", WIDTHS[0])
    convolution("decoder.conv_out", WIDTHS[0], 3)
    if quant:
        convolution("quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1)
        convolution("post_quant_conv", CHANNELS, CHANNELS, 1)
    return weights


class Reference:
    """The published layers, called by their names."""

    def __init__(self, weights):
        self.weights = weights

    def of(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, name, x):
        return group_norm(x, 32, *self.of(name), eps=1e-6)

    def block(self, name, x):
        hidden = conv2d(silu(self.norm(f"{name}.norm1", x)), *self.of(f"{name}.conv1"), padding=1)
        hidden = conv2d(silu(self.norm(f"{name}.norm2", hidden)), *self.of(f"{name}.conv2"), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return hidden + (conv2d(x, *self.of(shortcut)) if f"{shortcut}.weight" in self.weights else x)

    def attention(self, name, x):
        if f"{name}.q.weight" not in self.weights:
            return x
        normed = self.norm(f"{name}.norm", x)
        q, k, v = (conv2d(normed, *self.of(f"{name}.{part}")).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(dim=-1)
        return x + conv2d((v @ weights.transpose(1, 2)).view_as(x), *self.of(f"{name}.proj_out"))

    def middle(self, half, x):
        x = self.attention(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)

    def last(self, half, x):
        return conv2d(silu(self.norm(f"{half}.norm_out", x)), *self.of(f"{half}.conv_out"), padding=1)

    def moments(self, images):
        x = conv2d(images, *self.of("encoder.conv_in"), padding=1)
        for level in range(len(WIDTHS)):
            for number in range(DEPTH):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
                x = self.attention(f"encoder.down.{level}.attn.{number}", x)
            if level < len(WIDTHS) - 1:
                x = conv2d(pad(x, (0, 1, 0, 1)), *self.of(f"encoder.down.{level}.downsample.conv"), stride=2)
        x = self.last("encoder", self.middle("encoder", x))
        return conv2d(x, *self.of("quant_conv")) if "quant_conv.weight" in self.weights else x

    def decode(self, z):
        z = conv2d(z, *self.of("post_quant_conv")) if "post_quant_conv.weight" in self.weights else z
        x = self.middle("decoder", conv2d(z, *self.of("decoder.conv_in"), padding=1))
        for level in reversed(range(len(WIDTHS))):
            for number in range(DEPTH + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
                x = self.attention(f"decoder.up.{level}.attn.{number}", x)
            if level:
                x = interpolate(x, scale_factor=2.0, mode="nearest")
                x = conv2d(x, *self.of(f"decoder.up.{level}.upsample.conv"), padding=1)
        return self.last("decoder", x)


@pytest.mark.parametrize("quant", [True, False])
@torch.inference_mode()
def test_it_encodes_and_decodes_as_the_published_layers_do(quant):
    weights = published(quant)
    others = {"loss.logvar": torch.zeros(1), "linear_proj.weight": torch.zeros(2, 2)}  # what trained it
    autoencoder: Any = from_ldm({**weights, **others}).double()
    reference = Reference({name: weight.double() for name, weight in weights.items()})
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    posterior, moments = autoencoder.encode(images).latent_dist, reference.moments(images)
    torch.testing.assert_close(posterior.parameters, moments)
    z = moments[:, :CHANNELS]
    torch.testing.assert_close(autoencoder.decode(z).sample, reference.decode(z))
    assert z.std() > 0.1 < reference.decode(z).std()


def imported(*arguments):
    SCRIPT.main(parse(SCRIPT.ImportConfig, SCRIPT.as_list([*map(str, arguments)])))


def test_the_command_normalises_by_published_statistics_or_by_images(tmp_path, monkeypatch):
    torch.save({"state_dict": published()}, tmp_path / "autoencoder.pt")
    mean, std = torch.randn(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "statistics.pt")
    files = [tmp_path / "autoencoder.pt", tmp_path / "statistics.pt"]
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = Reference(published()).moments(images.float() / 127.5 - 1)[:, :CHANNELS]

    imported("--source", "ldm", "--weights", *files, "--output", tmp_path / "by-file")
    codec = create_codec(str(tmp_path / "by-file"))
    assert codec.latent_shape(16, 16) == (CHANNELS, 4, 4)
    torch.testing.assert_close(codec.encode(images), (z - mean) / std, rtol=1e-4, atol=1e-4)

    settings = ["--data.num_images", "40", "--data.image_size", "16"]
    imported("--source", "ldm", "--weights", files[0], "--output", tmp_path / "by-images", *settings)
    data = open_split(DataConfig(num_images=40, image_size=16), "train")
    drawn = create_codec(str(tmp_path / "by-images")).encode(
        torch.stack([image for image, _ in data]), torch.Generator().manual_seed(1)
    )
    assert drawn.mean(dim=(0, 2, 3)).abs().max() < 0.3
    torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), torch.ones(CHANNELS), rtol=0, atol=0.3)

    asked = []
    monkeypatch.setattr(
        public_files, "from_hub", lambda repo, name, flag: asked.append((repo, name)) or files[len(asked) - 1]
    )
    imported("--weights", public_files.VA_VAE, "--output", tmp_path / "by-name")
    assert asked == [
        (f"hustvl/{public_files.VA_VAE}", name) for name in (f"{public_files.VA_VAE}.pt", "latents_stats.pt")
    ]
    assert create_codec(str(tmp_path / "by-name")).identity == codec.identity


def test_an_average_counts_before_the_weights_that_it_is_of():
    weights = published()
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in weights.items()}
    others = {"model_ema.decay": torch.ones(1), "model_ema.diffusion_modeloutweight": torch.ones(1)}
    taken = from_ldm({**weights, **averages, **others}).state_dict()
    expected = from_ldm({name: tensor + 1 for name, tensor in weights.items()}).state_dict()
    assert all(torch.equal(taken[name], tensor) for name, tensor in expected.items())


def test_what_an_autoencoders_import_does_not_do_is_refused(here, monkeypatch):
    torch.save({"state_dict": published()}, "autoencoder.pt")
    torch.save({"mean": torch.zeros(CHANNELS), "std": torch.ones(CHANNELS)}, "latents_stats.pt")
    ldm = ["--source", "ldm", "--output", "imported", "--weights", "autoencoder.pt"]
    with pytest.raises(ValueError, match=r"^--image_size 16: .* give --data.image_size 16$"):
        imported(*ldm, "--image_size", 16)
    with pytest.raises(ValueError, match=r"^--autoencoder pixel: it is of a backbone"):
        imported(*ldm, "--autoencoder", "pixel")
    with pytest.raises(ValueError, match=r"^--data: latents are normalised by latents_stats\.pt, not by images"):
        imported(*ldm, "latents_stats.pt", "--data.image_size", 16)

    # The public file by its name, which is here, has its authors' statistics; where they are not here they are fetched.
    public = f"{public_files.VA_VAE}.pt"
    (here / "autoencoder.pt").rename(public)
    imported("--source", "ldm", "--weights", public, "--output", "imported")
    assert create_codec("imported").normalisation == {"scale": [1.0] * CHANNELS, "shift": [0.0] * CHANNELS}
    statistics, asked = (here / "latents_stats.pt").rename("other.pt"), []
    monkeypatch.setattr(public_files, "from_hub", lambda repo, name, flag: asked.append(name) or statistics)
    imported("--weights", here / public, "--output", "again")
    assert asked == ["latents_stats.pt"]


def test_weights_and_statistics_of_other_formats_are_refused():
    with pytest.raises(AutoencoderError, match=r"^--weights: not .* format \(decoder\.conv_in\.weight is missing\)$"):
        from_ldm({"encoder.weight": torch.zeros(1)})
    with pytest.raises(AutoencoderError, match="gives no mean and variance, as those of VQ do not"):
        from_ldm({**published(), "encoder.conv_out.weight": torch.zeros(CHANNELS, WIDTHS[-1], 3, 3)})
    with pytest.raises(AutoencoderError, match=r"^--weights: not an autoencoder of latent-diffusion's format"):
        from_ldm({name: weight for name, weight in published().items() if "mid.block_2" not in name})
    for saved in ({"mean": torch.zeros(CHANNELS)}, {"mean": torch.zeros(CHANNELS), "std": torch.zeros(CHANNELS)}):
        with pytest.raises(AutoencoderError, match="a mean and a positive std of each of 6 channels"):
            read_statistics(saved, CHANNELS)
