"""LoRA files with seeded factors for a model, in the published layouts, and the weights that they give."""

from __future__ import annotations

import torch

from sd.checkpoint.lora import targets

# diffusers' module (in kohya's files with `_`): name in StableDiffusion.state_dict, and its rows in thirds or None.
# For the two-level models of `checkpoints.small`; written by hand, so that the code's own renaming is tested.
WEIGHTS = {
    "unet.conv_in": ("unet.input_blocks.0.0", None),
    "unet.time_embedding.linear_1": ("unet.time_embed.0", None),
    "unet.down_blocks.0.resnets.0.conv1": ("unet.input_blocks.1.0.in_layers.2", None),
    "unet.down_blocks.0.attentions.0.proj_in": ("unet.input_blocks.1.1.proj_in", None),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        None,
    ),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (
        "unet.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        None,
    ),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        None,
    ),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "unet.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
        None,
    ),
    "unet.down_blocks.0.downsamplers.0.conv": ("unet.input_blocks.2.0.op", None),
    "unet.mid_block.attentions.0.proj_out": ("unet.middle_block.1.proj_out", None),
    "unet.up_blocks.1.resnets.1.conv_shortcut": ("unet.output_blocks.3.0.skip_connection", None),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (
        "text_encoder.transformer.resblocks.0.attn.in_proj_weight",
        0,
    ),
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": (
        "text_encoder.transformer.resblocks.1.attn.in_proj_weight",
        2,
    ),
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj": (
        "text_encoder.transformer.resblocks.1.attn.out_proj",
        None,
    ),
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": ("text_encoder.transformer.resblocks.1.mlp.c_fc", None),
}


def factors(shape, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down [rank, in, ...] and up [out, rank, ...] for a weight of that shape, of an update about as large as it."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
    return down, torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.1


def kohya_key(module: str) -> str:
    """kohya's name of a module with the names of diffusers and a network in front."""
    network, _, name = module.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + name.replace(".", "_")


def kohya(model, seed: int = 0, rank: int = 4, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    """A LoRA of every weight that it can have, in kohya's layout."""
    state = {}
    for i, (module, weight) in enumerate(targets(model.state_dict()).items()):
        key = kohya_key(module)
        down, up = factors(weight.shape, rank, 1000 * seed + i)
        state.update({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state
