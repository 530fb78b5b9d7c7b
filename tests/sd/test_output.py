"""Numbered PNG files and the grid."""

from __future__ import annotations

import os
import weakref

import pytest
import torch
from PIL import Image

from sd.cli.output import GridFile, OutputFolder


def test_concurrent_writers_use_different_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    first, second = OutputFolder("out"), OutputFolder("out")
    listed = os.listdir("out/samples")
    monkeypatch.setattr("sd.cli.output.os.listdir", lambda folder: listed)  # listed before either wrote
    names = [album.add(image, [{"by": by}])[0].name for album, by in ((first, 1), (second, 2), (first, 3))]
    assert names == ["00000.png", "00001.png", "00002.png"]
    assert [Image.open(f"out/samples/{name}").text["by"] for name in names] == ["1", "2", "3"]


def saved_grid(folder, batches, count: int, per_row: int) -> torch.Tensor:
    with GridFile(folder, count, per_row) as file:
        for images in batches:
            file.add(images, {"seed": 3, "prompt": "円"})
        path = file.save()
    image = Image.open(path)
    assert image.text == {"seed": "3", "prompt": "円"}
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1, 1, 1), (2, 3)])
def test_grid_layout_matches_torchvision(tmp_path, sizes):
    images = torch.randint(1, 256, (5, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = saved_grid(tmp_path, images.split(sizes), 5, 2)
    assert out.shape == (3 * (4 + 2) + 2, 2 * (6 + 2) + 2, 3)
    assert torch.equal(out[2:6, 2:8], images[0])
    assert torch.equal(out[2:6, 10:16], images[1])
    assert torch.equal(out[14:18, 2:8], images[4])
    assert out.int().sum() == images.int().sum()  # the rest is black
    assert saved_grid(tmp_path, [images], 5, 9).shape == (4 + 4, 5 * 8 + 2, 3)
    assert torch.equal(saved_grid(tmp_path, [images[:1]], 1, 1), images[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid-0000.png", "grid-0001.png", "grid-0002.png"]


def test_incomplete_grid_is_discarded(tmp_path):
    with GridFile(tmp_path, 4, 2) as file:
        file.add(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {})
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_grid(tmp_path):
    """After each complete row no image is alive."""
    alive: set[int] = set()
    most = 0
    with GridFile(tmp_path, 40, 2) as file:
        for i in range(40):
            images = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
            storage = images.numpy()  # shares the memory, and dies with the last tensor that does
            alive.add(i)
            weakref.finalize(storage, alive.discard, i)
            images = torch.from_numpy(storage)
            del storage
            file.add(images, {})
            del images
            most = max(most, len(alive))
        file.save()
    assert most <= 2
