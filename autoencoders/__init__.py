"""The frozen codecs between images and the latents that backbones denoise."""
