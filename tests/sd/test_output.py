"""Numbered PNG files and the grid."""

from __future__ import annotations

import os

import torch
from PIL import Image

from sd.cli.output import OutputFolder, grid


def test_concurrent_writers_use_different_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    first, second = OutputFolder("out"), OutputFolder("out")
    listed = os.listdir("out/samples")
    monkeypatch.setattr("sd.cli.output.os.listdir", lambda folder: listed)  # listed before either wrote
    names = [album.add(image, [{"by": by}])[0].name for album, by in ((first, 1), (second, 2), (first, 3))]
    assert names == ["00000.png", "00001.png", "00002.png"]
    assert [Image.open(f"out/samples/{name}").text["by"] for name in names] == ["1", "2", "3"]


def test_grid_layout_matches_torchvision():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 4, 6, 3)
    out = grid(images, 2)
    assert out.shape == (3 * (4 + 2) + 2, 2 * (6 + 2) + 2, 3)
    assert out[2:6, 2:8].eq(1).all()
    assert out[2:6, 10:16].eq(2).all()
    assert out[14:18, 2:8].eq(5).all()
    assert out.sum() == images.sum()  # the rest is black
    assert grid(images, 9).shape == (4 + 4, 5 * 8 + 2, 3)
    assert torch.equal(grid(images[:1], 1), images[0])
