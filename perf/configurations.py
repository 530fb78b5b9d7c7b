"""What to run: frozen configurations with a string id, and the named sets of them. Imports neither torch nor pytest."""

from __future__ import annotations

from dataclasses import asdict, dataclass

PROMPT = "A photo"  # of the published experiment, like the seed, the sampler and the steps below


@dataclass(frozen=True)
class Configuration:
    """One way of making a picture. `sdpa_kernels` empty means all; sizes of None are the model's own."""

    model: str = "tiny"
    attention: str = "sdpa"
    sdpa_kernels: tuple[str, ...] = ()
    compile: str = "none"
    precision: str = "full"
    batch: int = 1
    steps: int = 50
    sampler: str = "plms"
    scale: float = 7.5
    prompt: str = PROMPT
    seed: int = 1

    @property
    def id(self) -> str:
        """Such as `sd2-mha-mem_efficient-compile-b1`: parts at their defaults are left out."""
        parts = [self.model, self.attention, *self.sdpa_kernels]
        if self.compile != "none":
            parts.append("compile" if self.compile == "default" else f"compile-{self.compile}")
        if self.precision != "full":
            parts.append(self.precision)
        if (self.sampler, self.steps) != ("plms", 50):
            parts.append(f"{self.sampler}{self.steps}")
        return "-".join([*parts, f"b{self.batch}"])

    def as_dict(self) -> dict:
        """All fields, ready for JSON."""
        return {**asdict(self), "sdpa_kernels": list(self.sdpa_kernels), "id": self.id}


ATTENTIONS = ("original", "xformers", "mha", "sdpa")
BATCHES = (1, 2, 4)


def attention_by_batch(model: str, precision: str) -> list[Configuration]:
    """Every attention implementation at every batch size."""
    return [
        Configuration(model=model, attention=attention, precision=precision, batch=batch)
        for attention in ATTENTIONS
        for batch in BATCHES
    ]
