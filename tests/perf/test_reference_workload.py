"""The reference workload of the machine's speed."""

from __future__ import annotations

import torch

from perf.worker.reference_workload import ReferenceWorkload


def test_numbers_are_drawn_on_the_device(monkeypatch):
    """134 million for a GPU. `meta` stands for it: a number drawn on the CPU would have to be copied."""
    devices, draw = [], torch.randn

    def randn(*size, generator, device="cpu"):
        devices.append(torch.device(device))
        return draw(*size, device=device)

    monkeypatch.setattr(torch, "randn", randn)
    generator = torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": devices.append(torch.device(device)) or generator)
    ReferenceWorkload(torch.device("meta"))
    assert devices and set(devices) == {torch.device("meta")}
