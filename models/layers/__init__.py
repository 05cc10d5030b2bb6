"""Bricks of the backbones.

Axis letters, here and in the backbones: `b` batch, `c` channels, `h w` grid, `n` tokens, `m` tokens attended to,
`d` width, `k` attention heads, `e` width of one head, `p q` sides of a patch. Images are `[b c h w]`, grids of
tokens `[b h w d]`, sequences `[b n d]`; `cond` is `[b d]` and has gone through its SiLU once, at the top.
"""
