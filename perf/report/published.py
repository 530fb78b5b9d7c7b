"""The runtimes published in the articles (perf/published/), as printed."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "published"
SOURCE = {
    "sd2": 'PyTorch blog, "Accelerated Generative Diffusion Models with PyTorch 2" (2023)',
    "sd1": 'PyTorch blog, "Performance experiments with Stable Diffusion"',
}
# names of the articles -> techniques
TECHNIQUES = {
    "original": "original",
    "original_xformers": "original-xformers",
    "optimized_math": "mha-math",
    "optimized_mem_efficient": "mha-mem_efficient",
    "optimized_mem_efficient_compile": "mha-mem_efficient-compile",
    "optimized_mha": "mha",
}
TORCH = {
    ("sd2", "original"): "1.12",
    ("sd2", "optimized"): "2.0.0.dev20230111",
    ("sd1", "original"): "1.11",
    ("sd1", "optimized"): "2.0.0.dev20221220",
}
GPUS = ("P100", "T4", "A10", "V100", "A100")  # in the order of the articles' columns


@dataclass(frozen=True)
class PublishedTime:
    """One cell of a published table.

    seconds: of a run of `iterations` calls that make `batch` images each, averaged over 10 launches; None if not run.
    iterations: None if not printed. improvement_percent: as printed.
    """

    model: str
    technique: str
    gpu: str
    batch: int
    iterations: int | None
    seconds: float | None
    improvement_percent: float | None

    @property
    def torch(self) -> str:
        """The PyTorch version of the article."""
        return TORCH[self.model, "original" if self.technique.startswith("original") else "optimized"]

    @property
    def work(self) -> tuple:
        """The work of the articles, as results.Result.work: comparable with own results of the same."""
        return self.model, "txt2img", 50, "plms", (), (0, 0)

    @property
    def seconds_per_image(self) -> float | None:
        """None if not run, or if the number of images is not printed."""
        if self.seconds is None or self.iterations is None:
            return None
        return self.seconds / self.iterations / self.batch


@lru_cache(maxsize=1)
def published() -> tuple[PublishedTime, ...]:
    """Every published cell, in the order of the tables."""
    cells = []
    for model in SOURCE:
        with open(FOLDER / f"{model}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells.append(
                    PublishedTime(
                        model=row["model"],
                        technique=TECHNIQUES[row["configuration"]],
                        gpu=row["gpu"],
                        batch=int(row["n_samples"]),
                        iterations=int(row["n_iter"]) if row.get("n_iter") else None,
                        seconds=float(row["seconds"]) if row["seconds"] else None,
                        improvement_percent=float(row["improvement_percent"]) if row["improvement_percent"] else None,
                    )
                )
    return tuple(cells)
