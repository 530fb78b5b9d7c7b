"""Comparisons of two slots of one session: verdicts, the control arm, and the launches after which they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from perf.analysis.paired import LOOKS, MOST_ROUNDS, ROUNDS, is_settled, launch_effects
from perf.analysis.verdicts import Decision, Verdict, decide_looks, decide_paired
from perf.session.measurements import Measurements, launch_rounds, paired_rounds
from perf.session.plan import CONTROL, Plan, Slot
from perf.session.runner import Runner

# A session without a fault is INVALID by its control arm in at most 2 of 1000, so that other verdicts are not lost.
CONTROL_LEVEL = 0.002
CONTROL_LAUNCHES = 2  # fewer have no interval
UNPAIRED_CONTROL_LAUNCHES = 6  # of a session without pairs


@dataclass(frozen=True)
class Pair:
    """Two slots to compare. id: of the decision. head, base: slot names. against: the name of the base in the verdict."""

    id: str
    head: str
    base: str
    against: str


def pairs_of(plan: Plan, variant: str | None, against: Callable[[str], str]) -> list[Pair]:
    """The comparisons of a session: each configuration with its second label. against: the base's name by id."""
    ids = [slot.id for slot in plan.own_slots] if variant else []
    return [Pair(id, id, f"{id}@{variant}", against(id)) for id in ids]


def control_slot(slots: Iterable[Slot]) -> Slot:
    """The control arm of slots: the reference configuration, `original` if it is measured, a second time."""
    own = [slot.configuration for slot in slots if slot.variant is None]
    plain = [each for each in own if (each.engine, each.attention, each.compile) == ("sd", "original", "none")]
    return Slot((plain or own)[0], CONTROL)


@dataclass
class Judge:
    """Judges the pairs of a session after each look.

    margin: the smallest relevant change, a fraction. launch_seconds: of a launch of all slots, for the estimate of a longer
    session; None if unknown.
    """

    plan: Plan
    pairs: list[Pair]
    margin: float
    launch_seconds: float | None = None

    def decisions(self, measurements: Measurements) -> dict[str, Decision]:
        """The decision of each pair by id. Pairs with a failure are omitted; all are INVALID in an invalid session."""
        invalid = self.invalid(measurements)
        return {
            pair.id: Decision(Verdict.INVALID, invalid, against=pair.against) if invalid else decision
            for pair, (decision, _) in self._judged(measurements)
        }

    def undecided(self, measurements: Measurements) -> list[str]:
        """Ids of the pairs that need another look."""
        return [pair.id for pair, (_, is_open) in self._judged(measurements) if is_open]

    def _judged(self, measurements: Measurements) -> Iterable[tuple[Pair, tuple[Decision, bool]]]:
        for pair in self.pairs:
            if measurements.by_name[pair.head].failure or measurements.by_name[pair.base].failure:
                continue
            yield pair, self._decide(measurements, pair)

    def _decide(self, measurements: Measurements, pair: Pair) -> tuple[Decision, bool]:
        effects = launch_effects(*paired_rounds(measurements.by_name[pair.head], measurements.by_name[pair.base]))
        looks = self.plan.looks or (self.plan.launches,)
        return decide_looks(effects, self.margin, looks, pair.against, self.launch_seconds)

    def control(self, measurements: Measurements) -> Decision | None:
        """The comparison of the control arm with its twin; None without one."""
        slot = self.plan.control
        if slot is None:
            return None
        control, twin = measurements.by_name[slot.name], measurements.by_name[slot.configuration.id]
        if control.failure or twin.failure:
            return None
        effects = launch_effects(*paired_rounds(control, twin))
        return decide_paired(effects, self.margin, CONTROL_LEVEL, slot.configuration.id)

    def settled(self, measurements: Measurements, launch: int, slots: Sequence[Slot]) -> bool:
        """Whether the rounds of a launch settle the comparisons, and the control arm, of slots that alternate in it."""
        sides = [(pair.head, pair.base) for pair in self.pairs]
        if self.plan.control is not None:
            sides.append((self.plan.control.name, self.plan.control.configuration.id))
        alternating = {slot.name: measurements.by_name[slot.name] for slot in slots}
        measured = [[alternating[name] for name in pair] for pair in sides if alternating.keys() >= set(pair)]
        return is_settled([launch_rounds(*pair, launch) for pair in measured if not any(side.failure for side in pair)])

    def invalid(self, measurements: Measurements) -> str | None:
        """Why no comparison of the session is valid, as a reason code with its detail, or None."""
        control = self.control(measurements)
        if control is not None and control.verdict in (Verdict.SLOWER, Verdict.FASTER):
            return f"control_arm {control}"
        return measurements.invalid()


def measure(
    runner: Runner,
    measurements: Measurements,
    judge: Judge,
    log: Callable[[str], None],
    planned: Callable[[Plan, int, int], None] = lambda plan, first, last: None,
) -> None:
    """Run a plan: all launches, then, for pairs that need another look, as many as it takes.

    planned(plan, first, last): called before further launches.
    """
    runner = replace(runner, settled=judge.settled)
    runner.run(measurements)
    done = runner.plan.launches
    for look in runner.plan.looks:
        if look <= done:
            continue
        ids = judge.undecided(measurements)
        if not ids:
            return
        log(f"perf: undecided after {done} launches, going on to {look}: {', '.join(ids)}")
        further = further_plan(runner.plan, judge, ids)
        planned(further, done, look)
        replace(runner, plan=further).run(measurements, done, look)
        done = look


def further_plan(plan: Plan, judge: Judge, ids: Iterable[str]) -> Plan:
    """The plan of the slots that undecided pairs need, with the control arm and its twin."""
    names = {name for pair in judge.pairs if pair.id in set(ids) for name in (pair.head, pair.base)}
    if plan.control is not None:
        names |= {plan.control.name, plan.control.configuration.id}
    return replace(plan, slots=tuple(slot for slot in plan.slots if slot.name in names))


def looks_of(launches: int | None, paired: bool) -> tuple[int, ...]:
    """The looks of a session: LOOKS for pairs without a requested number of launches, else a single one."""
    return LOOKS if paired and launches is None else ()


def rounds_of(rounds: int | None, device: str, paired: bool) -> tuple[int, int]:
    """(rounds of a launch, most rounds of one that they do not settle, or 0). rounds: a requested number, which is exact."""
    if rounds is not None:
        return rounds, 0
    if device == "cuda":
        return 2, 0
    return (ROUNDS, MOST_ROUNDS) if paired else (4, 0)
