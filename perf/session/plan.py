"""The plan of a session: launches and rounds in order, and the seed of each round."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from perf.configurations.configuration import Configuration

SEED_STRIDE = 1000  # between rounds; larger than any batch, since image i of a round has the round's seed + i
WARM_UP_ROUND = 999  # no timed round has this number
CONTROL = "control"  # the variant of the control arm
Loading = Literal["all", "variants", "single"]
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """A configuration under one label: the working tree (None), another commit (`base`), an A/A repetition (`aa`), the
    control arm (`control`), or the second side of --perf-b (`b`), which is another configuration than the one it is
    compared with.

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
    """Launches of each slot and rounds of each launch.

    most_rounds: of a launch whose first `rounds` do not settle its comparisons; 0 for no more than `rounds`. loading: which
    slots are loaded together and alternate round by round (perf.session.loading). seed: of the order of the slots, which is
    drawn anew for every launch and cycle. looks: numbers of launches after which pairs are judged.
    """

    slots: tuple[Slot, ...]
    launches: int
    rounds: int
    loading: Loading = "single"
    seed: int = 0
    looks: tuple[int, ...] = ()
    most_rounds: int = 0

    @property
    def most_launches(self) -> int:
        """The launches of a slot if every look is taken."""
        return max((self.launches, *self.looks))

    @property
    def cycles(self) -> int:
        """The rounds of a launch that is never settled."""
        return max(self.rounds, self.most_rounds)

    def turns(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, tuple[Slot, ...]]]:
        """Yield (launch, slots that are loaded together), each launch in its own order.

        The first launch has the order of the plan, in which the working tree precedes other labels of a configuration:
        they share a compile cache, and its first call is the cold one that is reported.
        """
        for launch in range(first, self.launches if last is None else last):
            for group in self.shuffled(self.groups(), launch, "groups") if launch else self.groups():
                yield launch, self.shuffled(group, launch, "loading") if launch else group

    def groups(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots that are loaded together."""
        if self.loading == "all":
            return (self.slots,)
        if self.loading == "variants":
            grouped = itertools.groupby(self.slots, key=lambda slot: slot.id)
            return tuple(tuple(variants) for _, variants in grouped)
        return tuple((slot,) for slot in self.slots)

    def shuffled(self, items: Sequence[T], launch: int, cycle: int | str) -> tuple[T, ...]:
        """The items in the order of a cycle of a launch; equal for equal arguments, so that a resumed session repeats it."""
        order = list(items)
        random.Random(f"{self.seed} {launch} {cycle}").shuffle(order)
        return tuple(order)

    @property
    def own_slots(self) -> list[Slot]:
        """The slots of the working tree itself."""
        return [slot for slot in self.slots if slot.variant is None]

    @property
    def control(self) -> Slot | None:
        """The control arm: the reference configuration a second time."""
        return next((slot for slot in self.slots if slot.variant == CONTROL), None)

    def as_dict(self) -> dict[str, Any]:
        """The plan as a journal stores it; a resumed session must have an equal one."""
        # An id omits fields that most configurations share, such as the prompt and the path of the weights.
        own = [*self.own_slots, *(slot for slot in self.slots if slot.compared_id)]
        configurations = [slot.configuration.as_dict() for slot in own]
        slots = [slot.name for slot in self.slots]
        launches = {"launches": self.launches, "looks": list(self.looks)}
        rounds = {"rounds": self.rounds, "most_rounds": self.most_rounds}
        return {"slots": slots, **launches, **rounds, "configurations": configurations}
