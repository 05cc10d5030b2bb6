"""DINOv2 sees images as those who publish its distances show them to it."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from metrics.extractors import with_resizing


class Seen(nn.Module):
    def forward(self, images):
        return (images,)


def test_images_are_resized_as_pil_does_and_not_again():
    images = torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = with_resizing(Seen(), 224)(images)[0]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = np.stack([np.asarray(each.resize((224, 224), Image.Resampling.BICUBIC)) for each in pictures])
    difference = (found.permute(0, 2, 3, 1).int() - torch.from_numpy(expected).int()).abs()
    assert difference.max() <= 2  # of 255, where both passes round
    assert difference.float().mean() < 0.1
    again = interpolate_bilinear_2d_like_tensorflow1x(found.float(), size=(224, 224), align_corners=False)
    assert torch.equal(again, found.float())
