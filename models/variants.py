"""The backbones' names: each maps to a class and the constructor arguments that differ from the class's own defaults.

A class is given by its place, and imported, with torch, when it is called for: a misspelt name is refused at once.
"""

from typing import Any

Variant = tuple[Any, dict[str, Any]]  # a class, or its place as "module:class", and arguments

_XSWIN = "models.xswin:XSwin"
XSWIN: dict[str, Variant] = {
    "XSwin": (_XSWIN, {}),
    "USwin": (_XSWIN, {"skip": "concat"}),
    "XSwin-S": (_XSWIN, {"dim": 96, "num_heads": (3, 6), "num_global_blocks": 2}),
    "XSwin-B": (_XSWIN, {"dim": 384, "num_heads": (12, 24)}),
    "XSwin-L": (_XSWIN, {"dim": 576, "depths": (4, 4), "num_heads": (18, 36), "num_global_blocks": 6}),
}

_DIT = "models.dit:DiT"
_DIT_SIZES = {
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
    "XL": {"dim": 1152, "depth": 28, "num_heads": 16},
}
_DIT_FAMILIES = {  # arguments that differ from the defaults, and patch sizes
    "DiT": ({}, (2, 4, 8)),
    "UViT": ({"long_skips": True}, (2, 4, 8)),
    "LightningDiT": ({"norm": "rms", "mlp": "swiglu", "positions": "both"}, (1, 2)),  # Yao et al. 2025
}
DIT: dict[str, Variant] = {
    f"{family}-{size}/{patch_size}": (_DIT, {**row, **arguments, "patch_size": patch_size})
    for family, (arguments, patch_sizes) in _DIT_FAMILIES.items()
    for size, row in _DIT_SIZES.items()
    for patch_size in patch_sizes
}

_UVIT = "models.uvit:UViTTokens"
_UVIT_SIZES = {  # Bao et al. 2023, table 1, which counts the middle block too
    "S": {"dim": 512, "depth": 13, "num_heads": 8},
    "M": {"dim": 768, "depth": 17, "num_heads": 12},
    "L": {"dim": 1024, "depth": 21, "num_heads": 16},
    "H": {"dim": 1152, "depth": 29, "num_heads": 16},
}
_UVIT_FAMILIES = {  # sizes, and patch sizes
    "U-ViT": (_UVIT_SIZES, (2, 4)),
    "UViT-tokens": ({size: {**row, "depth": row["depth"] + 1} for size, row in _DIT_SIZES.items()}, (2, 4, 8)),
}
UVIT: dict[str, Variant] = {
    f"{family}-{size}/{patch_size}": (_UVIT, {**row, "patch_size": patch_size})
    for family, (sizes, patch_sizes) in _UVIT_FAMILIES.items()
    for size, row in sizes.items()
    for patch_size in patch_sizes
}

# Models of three studies in pixel space. The first four follow a published table for anime faces at 64x64; they have
# 10.2M, 50.1M, 77.0M and 83.0M parameters where it states 10M, 49M, 74M and 85M (its strided convolutions are 4x4, and
# its last level ends narrower). Its table and text disagree on Giga's middle; we use three blocks a group, as in the
# table's three letters.
_ANIME = {"channels": (32, 64, 128, 256, 512), "middle_channels": (512, 256)}
_GIGA = {"channels": (128, 256, 256, 512), "middle_channels": (512, 256), "dropout": 0.1}
_CIFAR10 = {"channels": (64, 64, 128, 256), "middle_channels": (512,), "num_heads": 8, "stem_size": 7}
_MNIST = {"channels": (64, 64, 128, 256), "middle_channels": (256,)}
_UNET = "models.unet:UNet"
_UNETS = {
    "UNet-Mini": {},
    "UNet-Simple": {**_ANIME, "down": ("AAA",) * 4, "middle": ("AA", "AA"), "up": ("AAA",) * 4},
    "UNet-Mega": {**_ANIME, "down": ("AAAAA",) * 4, "middle": ("AAA",) * 2, "up": ("AAAAA",) * 4, "dropout": 0.1},
    "UNet-Giga": {**_GIGA, "down": ("RARAA",) * 3, "middle": ("RAR", "RAR"), "up": ("RARAR",) * 3},
    # CIFAR-10 at 32x32: channel multipliers 1, 2, 4 and, in the middle, 8; attention at 16x16 and 8x8. The study's
    # variant for MNIST, -S, has one block a level and 16.9M parameters where the study states about 15M; it publishes
    # only the multipliers.
    "UNet-CIFAR10": {**_CIFAR10, "down": ("RR", "AA", "AA"), "middle": ("RR",), "up": ("AA", "AA", "RR")},
    "UNet-CIFAR10-S": {**_CIFAR10, "down": ("R", "A", "A"), "middle": ("RR",), "up": ("A", "A", "R")},
    # Class-conditional MNIST at 28x28, small enough for two CPU cores; attention at 7x7 and 4x4.
    "UNet-MNIST": {**_MNIST, "down": ("R", "R", "A"), "middle": ("A",), "up": ("A", "R", "R")},
}
UNET: dict[str, Variant] = {name: (_UNET, arguments) for name, arguments in _UNETS.items()}
