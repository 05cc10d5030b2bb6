"""Three shallow stages in place of one deep model: a small image from noise, upsampled, refined."""

from diffusion import DIFFUSIONS
from models import BACKBONES
from studies.cascade import three_stages
from studies.cascade.cascade import Cascade

DIFFUSIONS["cascade"] = Cascade
BACKBONES["Cascade"] = (three_stages.Cascade, {})
