"""Train an AutoencoderKL on images and procedural shapes; write it in diffusers' folder format.

    python scripts/train_autoencoder.py --data caltech101.zip --output assets/autoencoder

Objective: mean squared error plus a light KL term (Kingma and Welling 2014). Matrices and convolutions are trained by
Muon, vectors by Adam: at small batches several times faster than Adam alone. The weights are averaged (EMA),
the scale and shift of the latents measured on the training images, and PSNR on held-out images and shapes
printed, written to `metrics.json` and shown in `reconstructions.png`.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass(frozen=True)
class Architecture:
    """Shape of the AutoencoderKL; it reduces each side by 2 ** (len(channels) - 1).

    Args:
        channels: width of each level, finest first
        latent_channels: channels of the latent
        layers_per_block: residual blocks a level
        norm_groups: groups of the group norms
        attention: self-attention between the two middle blocks of encoder and decoder
    """

    channels: tuple[int, ...] = (16, 32, 64, 120)
    latent_channels: int = 4
    layers_per_block: int = 1
    norm_groups: int = 8
    attention: bool = True


def main(
    output: Path,
    data: str = "shapes",
    image_size: int = 64,
    exclude_classes: list[str] = [],  # noqa: B006  (read only)
    num_shapes: int = 6000,
    shapes_share: float = 0.3,
    architecture: Architecture = Architecture(),
    num_steps: int = 4000,
    batch_size: int = 16,
    lr: float = 5e-3,
    adam_lr: float = 2e-3,
    kl_weight: float = 2e-4,
    ema_decay: float = 0.995,
    precision: str = "bf16",
    seed: int = 0,
) -> None:
    """Train an AutoencoderKL and write it as a diffusers folder.

    Args:
        output: folder to write (config.json, fp16 safetensors, metrics.json, reconstructions.png)
        data: folder or zip of images, a class a folder; its training split is used. 'shapes': shapes alone
        image_size: side of the training images in pixels
        exclude_classes: class folders to leave out
        num_shapes: procedural shapes of each difficulty that join the images
        shapes_share: share of shapes in each batch
        architecture: widths and depth
        num_steps: optimizer steps
        batch_size: images a step
        lr: peak learning rate of the matrices (update of RMS 0.2 lr); linear warm-up, then cosine to zero
        adam_lr: the same of all other parameters
        kl_weight: weight of the KL divergence per latent value, against squared error per pixel value in [-1, 1]
        ema_decay: decay of the weight average that is written
        precision: 'bf16' (autocast) or 'fp32'
        seed: of initialisation, batches and posterior noise
    """
    import torch
    from diffusers import AutoencoderKL
    from tqdm import tqdm

    from data import open_dataset
    from data.shapes import DIFFICULTIES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator(device).manual_seed(seed + 1)

    def load(path: str, split: str, **kwargs: Any) -> torch.Tensor:
        dataset = open_dataset(path, split=split, image_size=image_size, **kwargs)
        return torch.stack([dataset[i][0] for i in tqdm(range(len(dataset)), desc=f"{path}, {split}", leave=False)])

    def load_shapes(split: str, num_images: int) -> dict[str, torch.Tensor]:
        return {f"shapes_{d}": load("shapes", split, difficulty=d, num_images=num_images) for d in DIFFICULTIES}

    shapes = torch.cat(list(load_shapes("train", num_shapes).values()))
    images = shapes if data == "shapes" else load(data, "train", exclude_classes=exclude_classes)

    blocks = len(architecture.channels)
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * blocks,  # pyright: ignore[reportArgumentType]
        block_out_channels=architecture.channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=architecture.layers_per_block,
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.norm_groups,
        sample_size=image_size,
        mid_block_add_attention=architecture.attention,
    )
    # A posterior that starts narrow: otherwise the first hundreds of steps go into escaping its noise.
    torch.nn.init.constant_(model.quant_conv.bias[architecture.latent_channels :], -5.0)
    model.to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    optimizer = MuonAndAdam(model, lr, adam_lr)
    warmup = min(50, num_steps // 10 + 1)

    def draw_batch() -> torch.Tensor:
        num_from_shapes = round(batch_size * shapes_share)
        picks = []
        for source, count in ((shapes, num_from_shapes), (images, batch_size - num_from_shapes)):
            batch = source[torch.randint(len(source), (count,), generator=generator)]
            mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
            picks.append(torch.where(mirrored, batch.flip(-1), batch))
        return torch.cat(picks).to(device).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)

    began = time.time()
    progress = tqdm(range(num_steps), desc="autoencoder")
    for step in progress:
        batch = draw_batch()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            posterior = model.encode(batch).latent_dist
            z = posterior.mean + posterior.std * torch.empty_like(posterior.mean).normal_(generator=noise_generator)
            reconstruction = model.decode(z).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        mse = (reconstruction.float() - batch).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = mse + kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, decay = min(1, (step + 1) / warmup), 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.step(factor=min(warm, decay))
        average.update_parameters(model)
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{psnr_of(mse.item()):.2f}", kl=f"{kl.item():.2f}")

    trained: Any = average.module.eval()
    scale, shift = measure_latents(trained, images, batch_size)
    trained.register_to_config(scaling_factor=scale, shift_factor=shift)

    held_out = load_shapes("test", 1500)
    if data != "shapes":
        held_out = {Path(data).stem: load(data, "test", exclude_classes=exclude_classes), **held_out}
    metrics: dict[str, Any] = {
        f"psnr_{name}": measure_psnr(trained, test, batch_size) for name, test in held_out.items()
    }
    metrics |= {"seconds": time.time() - began, "steps": num_steps, "batch_size": batch_size}
    metrics["command"] = " ".join(["python", *sys.argv])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    metrics["commit"] = commit.stdout.strip()

    written = output.with_name(output.name + ".partial")
    trained.half().save_pretrained(written)
    (written / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_reconstructions(trained.float(), held_out, written / "reconstructions.png")
    shutil.rmtree(output, ignore_errors=True)
    written.rename(output)
    print(json.dumps(metrics, indent=2))


class MuonAndAdam:
    """Muon (Jordan et al. 2024) on convolutions, as matrices of their output channels, and on linears; Adam elsewhere.

    The first and last layers, whose rows are colours, go to Adam too.
    """

    def __init__(self, model: Any, lr: float, adam_lr: float) -> None:
        import torch

        ends = {model.encoder.conv_in.weight, model.decoder.conv_out.weight}
        self.matrices = [p for p in model.parameters() if p.ndim > 1 and p not in ends]
        self.views = [torch.nn.Parameter(matrix.detach().flatten(1)) for matrix in self.matrices]  # the same memory
        rest = [p for p in model.parameters() if p.ndim == 1 or p in ends]
        muon = torch.optim.Muon(self.views, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = {muon: lr, adam: adam_lr}

    def step(self, factor: float) -> None:
        """One step at `factor` of the learning rates; the gradients are dropped."""
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad, matrix.grad = matrix.grad.flatten(1), None
        for optimizer, lr in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
            optimizer.zero_grad()


def psnr_of(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / mse)


def measure_latents(model, images, batch_size: int, num_images: int = 2048) -> tuple[float, float]:
    """Scale and shift that give posterior samples of the training images unit variance and zero mean."""
    import torch

    subset = images[:: max(1, len(images) // num_images)]
    with torch.inference_mode():
        latents = torch.cat(
            [
                model.encode(batch.to(model.device).float() / 127.5 - 1).latent_dist.sample()
                for batch in subset.split(batch_size)
            ]
        )
    return 1 / latents.std().item(), latents.mean().item()


def measure_psnr(model, images, batch_size: int) -> float:
    """Mean over images of each reconstruction's PSNR (posterior mean, 8-bit output) in dB."""
    import torch

    errors = []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            target = batch.to(model.device).float() / 127.5 - 1
            output = model.decode(model.encode(target).latent_dist.mean).sample
            output = (output * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1
            errors.append((output - target).square().mean(dim=(1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


def draw_reconstructions(model, held_out: dict, path: Path, columns: int = 12) -> None:
    """Rows of held-out images, each with its reconstructions below."""
    import torch
    from torchvision.utils import make_grid, save_image

    rows = []
    for images in held_out.values():
        picks = images[:: max(1, len(images) // columns)][:columns].to(model.device).float() / 127.5 - 1
        with torch.inference_mode():
            rows += [picks, model.decode(model.encode(picks).latent_dist.mean).sample]
    save_image(make_grid(torch.cat(rows).clamp(-1, 1) / 2 + 0.5, nrow=columns, padding=2), path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
