"""The order of launches and rounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from perf.configurations.configuration import Configuration


@dataclass(frozen=True)
class Slot:
    """What takes a turn: a configuration, as it is, of another commit (`base`), or the same once more (`aa`)."""

    configuration: Configuration
    variant: str | None = None

    @property
    def name(self) -> str:
        """The configuration's id, with the variant behind an @."""
        return self.configuration.id + (f"@{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Plan:
    """How much is measured of what. side_by_side: the variants of a configuration share their turn."""

    slots: tuple[Slot, ...]
    launches: int
    rounds: int
    side_by_side: bool = False

    def turns(self, first: int = 0) -> Iterator[tuple[int, tuple[Slot, ...]]]:
        """(launch, slots of one turn) in order; every odd launch runs backwards."""
        for launch in range(first, self.launches):
            slots = self.slots if launch % 2 == 0 else self.slots[::-1]
            if not self.side_by_side:
                yield from ((launch, (slot,)) for slot in slots)
                continue
            for _, together in itertools.groupby(slots, key=lambda slot: slot.configuration):
                yield launch, tuple(together)

    def doubled(self, names: Iterable[str]) -> Plan:
        """The same with twice the launches, for the configurations of the given slots alone."""
        ids = {self.slot(name).configuration.id for name in names}
        slots = tuple(slot for slot in self.slots if slot.configuration.id in ids)
        return replace(self, slots=slots, launches=2 * self.launches)

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        return next(slot for slot in self.slots if slot.name == name)

    def as_dict(self) -> dict[str, Any]:
        """What a journal must agree with to be gone on from."""
        slots = [slot.name for slot in self.slots]
        # A name leaves out what is the same for most: the prompt, the folder of the weights.
        configurations = [slot.configuration.as_dict() for slot in self.slots if slot.variant is None]
        return {"slots": slots, "launches": self.launches, "rounds": self.rounds, "configurations": configurations}


ROUND_APART = 1000  # seeds of neighbouring rounds differ by more than a batch, since image i has the round's seed + i


WARM_UP = 999
