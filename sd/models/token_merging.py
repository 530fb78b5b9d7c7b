"""Token merging for Stable Diffusion (ToMe-SD, arXiv 2303.17604): alike tokens attend as one. Approximate.

Of every 2x2 cells one token, here always the upper left one, is a destination; of the others, the most alike are
averaged into it before self-attention, and copied from it afterwards. The paper draws the destination at random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MAX_RATIO = 0.75  # the tokens that are no destinations


def merging(x, size: tuple[int, int], ratio: float):
    """How to merge the part `ratio` of the tokens x [B, H*W, C] of an image of `size` (H, W), both even.

    Returns merge: [B, H*W, C] -> [B, H*W - r, C] and unmerge, which goes back.
    """
    height, width = size
    count = int(height * width * ratio)
    cells = torch.arange(height * width, device=x.device).reshape(height // 2, 2, width // 2, 2).permute(0, 2, 1, 3)
    cells = cells.reshape(-1, 4)
    targets, sources = cells[:, 0], cells[:, 1:].flatten()
    unit = F.normalize(x, dim=-1)
    likeness, nearest = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(dim=-1)  # [B, sources]
    order = likeness.argsort(dim=-1, descending=True)
    merged, kept = order[:, :count], order[:, count:]
    nearest = nearest.gather(1, merged)

    def pick(tokens, index):
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))

    def merge(tokens):
        source = tokens[:, sources]
        index = nearest[..., None].expand(-1, -1, tokens.shape[-1])
        target = tokens[:, targets].scatter_reduce(1, index, pick(source, merged), reduce="mean")
        return torch.cat([pick(source, kept), target], dim=1)

    def unmerge(tokens):
        rest, target = tokens[:, : kept.shape[1]], tokens[:, kept.shape[1] :]
        source = torch.cat([pick(target, nearest), rest], dim=1)  # in the order of `order`
        source = pick(source, order.argsort(dim=-1))
        position = torch.cat([targets, sources]).argsort()
        return torch.cat([target, source], dim=1)[:, position]

    return merge, unmerge
