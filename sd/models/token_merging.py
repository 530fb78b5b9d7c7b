"""Token merging for Stable Diffusion (ToMe-SD, arXiv 2303.17604). Approximate.

In every 2x2 cell the upper left token is a destination; the paper draws it at random. The remaining tokens most similar to
a destination are averaged into it before self-attention, and copied from it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RATIO = 0.75  # the fraction of tokens that are no destinations


def merging(
    x: Tensor, size: tuple[int, int], ratio: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions that merge the fraction `ratio` of the tokens x [B, H*W, C] of an image of `size` (H, W), both even.

    Returns merge: [B, H*W, C] -> [B, H*W - r, C], and unmerge, its inverse up to the averaging.
    """
    height, width = size
    count = int(height * width * ratio)
    cells = torch.arange(height * width, device=x.device).reshape(height // 2, 2, width // 2, 2).permute(0, 2, 1, 3)
    cells = cells.reshape(-1, 4)
    targets, sources = cells[:, 0], cells[:, 1:].flatten()
    unit = F.normalize(x, dim=-1)
    similarity, nearest = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(dim=-1)  # [B, sources]
    order = similarity.argsort(dim=-1, descending=True)
    merged, unmerged = order[:, :count], order[:, count:]
    nearest = nearest.gather(1, merged)

    def pick(tokens: Tensor, index: Tensor) -> Tensor:
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))

    def merge(tokens: Tensor) -> Tensor:
        source = tokens[:, sources]
        index = nearest[..., None].expand(-1, -1, tokens.shape[-1])
        target = tokens[:, targets].scatter_reduce(1, index, pick(source, merged), reduce="mean")
        return torch.cat([pick(source, unmerged), target], dim=1)

    def unmerge(tokens: Tensor) -> Tensor:
        rest, target = tokens[:, : unmerged.shape[1]], tokens[:, unmerged.shape[1] :]
        source = torch.cat([pick(target, nearest), rest], dim=1)  # in the order of `order`
        source = pick(source, order.argsort(dim=-1))
        position = torch.cat([targets, sources]).argsort()
        return torch.cat([target, source], dim=1)[:, position]

    return merge, unmerge
