"""Class-conditional samples from an exported checkpoint, with diffusers' own schedulers.

pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=f"{FOLDER}/pipeline.py", trust_remote_code=True)
pipeline(["cat", "dog"], seed=0).images[0].save("cat.png")
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class ClassConditionalPipeline(DiffusionPipeline):
    """Pipeline whose image `i` depends only on (seed, i, its class), and equals that of sample.py.

    Args:
        denoiser: `denoiser(x_t, t, y)`.
        scheduler: scheduler of diffusers for the diffusion that the denoiser was trained with.
        vae: autoencoder; None for a denoiser of pixels.
        classes: names of the classes; empty for an unconditional model.
        num_steps: default number of sampling steps.
        spacing: spacing of the steps, a name in `SPACINGS`.
        guidance_scale: default scale of classifier-free guidance; 1 turns it off.
        guided_channels: number of channels that are guided, if not all; 0: the model has no trained null label.
        predicts_data: whether the denoiser of a flow predicts `x_0`, which is converted to the scheduler's velocity.
    """

    _optional_components = ["vae"]  # noqa: RUF012  # diffusers' name and form

    def __init__(
        self,
        denoiser,
        scheduler,
        vae=None,
        classes=None,
        num_steps=50,
        spacing="uniform",
        guidance_scale=1.0,
        guided_channels=None,
        predicts_data=False,
    ) -> None:  # arguments without types: before 0.37 diffusers stumbles over `list[str] | None`
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self.register_to_config(
            classes=classes or [],
            num_steps=num_steps,
            spacing=spacing,
            guidance_scale=guidance_scale,
            guided_channels=guided_channels,
            predicts_data=predicts_data,
        )

    @torch.no_grad()
    def __call__(
        self,
        classes: list[str | int],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample one image for each class, given by name or number; 0 for an unconditional model.

        Raises:
            ValueError: for an unknown class, or guidance without a trained null label.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and self.config.guided_channels == 0:
            raise ValueError(f"guidance_scale={scale}: the model has no trained null label to be guided away from")
        shape = (self.denoiser.config.channels, self.denoiser.config.height, self.denoiser.config.width)
        device = self.denoiser.device
        y = torch.tensor([self.label(name) for name in classes], device=device)
        generators = [generator_for(seed, index) for index in range(len(classes))]

        x_t = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        x_t = x_t * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_input = getattr(self.scheduler, "scale_model_input", lambda x_t, t: x_t)
        last = self.scheduler.config.num_train_timesteps - 1
        self.scheduler.set_timesteps(**SPACINGS[self.config.spacing](num_steps or self.config.num_steps, last))
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.guided(scale_input(x_t, t), t.to(device).expand(len(y)), y, scale)
            if self.config.predicts_data:  # x_t = x_0 + t / T (noise - x_0), and the velocity is noise - x_0
                output = (x_t - output) * self.scheduler.config.num_train_timesteps / t
            x_t = self.scheduler.step(output, t, x_t, generator=generators).prev_sample

        images = self.decode(x_t)
        if output_type == "np":
            return ImagePipelineOutput(images=images)
        return ImagePipelineOutput(images=self.numpy_to_pil(images / 255.0))

    def label(self, name: str | int) -> int:
        names, number = self.config.classes, int(name) if str(name).isdigit() else None
        if name in names:
            return names.index(name)
        if number is None or number >= max(1, len(names)):
            raise ValueError(f"{name}: no such class among the {len(names)}: {', '.join(names[:10])}, ...")
        return number

    def guided(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        """Guided prediction `null + scale * (conditional - null)`; a learned variance is the conditional one."""
        num_classes = self.denoiser.config.num_classes
        if scale == 1 or num_classes == 0:
            return self.prediction(self.denoiser(x_t, t, y))
        null = torch.full_like(y, num_classes)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        num = self.config.guided_channels or x_t.shape[1]
        mixed = torch.lerp(unconditional[:, :num], conditional[:, :num], scale)
        return self.prediction(torch.cat([mixed, conditional[:, num:]], dim=1))

    def prediction(self, output: torch.Tensor) -> torch.Tensor:
        """Drop the learned variance where the scheduler does not use it."""
        uses_variance = self.scheduler.config.get("variance_type") == "learned_range"
        return output if uses_variance else output[:, : self.denoiser.config.channels]

    def decode(self, x_0: torch.Tensor) -> np.ndarray:
        """Decode latents to 8-bit pixels [b h w 3]."""
        if self.vae is not None:
            config = self.vae.config
            shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]  # one value, or one per channel
            scale = [config.scaling_factor / std for std in config.get("latents_std") or [1.0]]
            shift, scale = (torch.tensor(values, device=x_0.device)[:, None, None] for values in (shift, scale))
            x_0 = self.vae.decode(x_0.float() / scale + shift).sample
        pixels = (x_0 * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


def generator_for(seed: int, index: int) -> torch.Generator:
    words = [seed, int.from_bytes(b"sample", "little"), index]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


def uniform(num_steps: int, last: int) -> dict:
    """Timesteps spaced evenly over 0..T-1, both ends included."""
    stride = last / max(1, num_steps - 1)
    return {"timesteps": [round(stride * i) if num_steps > 1 else last for i in reversed(range(num_steps))]}


def trailing(num_steps: int, last: int) -> dict:
    """Timesteps in equal steps down from T-1 (Lin et al. 2023, table 2)."""
    return {"timesteps": [round(i / num_steps * (last + 1)) - 1 for i in range(num_steps, 0, -1)]}


# Arguments of `scheduler.set_timesteps`, from the number of steps and the last timestep.
SPACINGS = {
    "uniform": uniform,
    "trailing": trailing,
    "flow": lambda num_steps, last: {"sigmas": [i / num_steps for i in range(num_steps, 0, -1)]},
    "karras": lambda num_steps, last: {"num_inference_steps": num_steps},
}
