"""The plan of a session: launches and rounds in order, and the seed of each round."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from perf.configurations.configuration import Configuration

SEED_STRIDE = 1000  # between rounds; larger than any batch, since image i of a round has the round's seed + i
WARM_UP_ROUND = 999  # no timed round has this number


@dataclass(frozen=True)
class Slot:
    """A configuration under one label: the working tree (None), another commit (`base`), an A/A repetition (`aa`), or the
    second side of --perf-b (`b`), which is another configuration than the one it is compared with.

    compared_id: the id of that other configuration, None where it is the same one.
    """

    configuration: Configuration
    variant: str | None = None
    compared_id: str | None = None

    @property
    def id(self) -> str:
        """The id that the variants of one comparison share."""
        return self.compared_id or self.configuration.id

    @property
    def name(self) -> str:
        """The id, followed by @ and the variant."""
        return self.id + (f"@{self.variant}" if self.variant else "")

    def seed(self, round_number: int) -> int:
        """The seed of a round's first image."""
        return self.configuration.seed + SEED_STRIDE * round_number


@dataclass(frozen=True)
class Plan:
    """Launches of each slot and rounds of each launch. side_by_side: variants of a configuration run in one turn."""

    slots: tuple[Slot, ...]
    launches: int
    rounds: int
    side_by_side: bool = False

    def turns(self, first: int = 0) -> Iterator[tuple[int, tuple[Slot, ...]]]:
        """Yield (launch, slots of one turn) in order; odd launches run in reverse order."""
        for launch in range(first, self.launches):
            slots = self.slots if launch % 2 == 0 else self.slots[::-1]
            if not self.side_by_side:
                yield from ((launch, (slot,)) for slot in slots)
                continue
            for _, variants in itertools.groupby(slots, key=lambda slot: slot.id):
                yield launch, tuple(variants)

    def doubled(self, ids: Iterable[str]) -> Plan:
        """Return this plan with twice the launches, for the configurations with these ids only."""
        chosen = set(ids)
        slots = tuple(slot for slot in self.slots if slot.id in chosen)
        return replace(self, slots=slots, launches=2 * self.launches)

    @property
    def own_slots(self) -> list[Slot]:
        """The slots of the working tree itself."""
        return [slot for slot in self.slots if slot.variant is None]

    def as_dict(self) -> dict[str, Any]:
        """The plan as a journal stores it; a resumed session must have an equal one."""
        # An id omits fields that most configurations share, such as the prompt and the path of the weights.
        own = [*self.own_slots, *(slot for slot in self.slots if slot.compared_id)]
        configurations = [slot.configuration.as_dict() for slot in own]
        slots = [slot.name for slot in self.slots]
        return {"slots": slots, "launches": self.launches, "rounds": self.rounds, "configurations": configurations}
