"""An nn.Module with a fixed input: `pytest perf --engine examples/module_engine.py:load`."""

import torch


def load(configuration):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(d_model=256, nhead=4, batch_first=True)
    layer.eval().to(configuration.device)
    x = torch.randn(configuration.batch, 128, 256, device=configuration.device)
    return torch.no_grad()(lambda seed: layer(x))
