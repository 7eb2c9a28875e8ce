"""Seats in jobs over several hosts: who may take them, and what they end with."""

from __future__ import annotations

import pytest

from app.contract.errors import LeaseLost, RankLost
from app.contract.records import Claim
from app.contract.states import JobState
from tests.contract.stage import ACCOUNT, LEASE, Stage, at_once

PROBLEM = RankLost("It was lost.").problem()


@pytest.fixture
def lead(stage: Stage) -> Claim:
    """The claim of a job's leader."""
    return stage.claim(stage.job().id, "leader")


def claim(stage: Stage, id: str, owner: str) -> Claim | None:
    return stage.store.claim(id, owner, LEASE)


def test_seats_are_for_others_and_one_for_each(stage: Stage, lead: Claim) -> None:
    first, second = stage.store.open_seats(lead, 3)
    assert claim(stage, first, "leader") is None
    taken = stage.claim(first, "other")
    assert (taken.kind, stage.store.seat_of(taken).host) == ("seat", 1)
    assert claim(stage, first, "third") is None
    assert claim(stage, second, "other") is None
    assert claim(stage, second, "third") is not None
    assert [seat.taken for seat in stage.store.seats(lead.work_id, 1)] == [False, True, True]


def test_of_many_that_want_a_seat_one_gets_it(stage: Stage, lead: Claim) -> None:
    (seat,) = stage.store.open_seats(lead, 2)
    won = [found for found in at_once(8, lambda number: claim(stage, seat, f"other-{number}")) if found is not None]
    assert len(won) == 1
    assert isinstance(won[0], Claim)


def test_a_seat_waits_in_the_place_of_its_job(stage: Stage, lead: Claim) -> None:
    """It comes before jobs that are younger than its own, and its leader does not get it."""
    younger = stage.job()
    (seat,) = stage.store.open_seats(lead, 2)
    assert stage.store.next_work(["job", "seat"], "other") == seat
    assert stage.store.next_work(["job", "seat"], "leader") == younger.id
    assert stage.store.next_work(["job"], "other") == younger.id
    stage.claim(seat, "other")
    assert stage.store.next_work(["job", "seat"], "third") == younger.id


ENDS = {
    "its lease": lambda stage, lead: stage.clock.pass_(LEASE + 1),
    "release": lambda stage, lead: stage.store.release(lead),
    "a retry": lambda stage, lead: stage.store.retry(lead, PROBLEM),
    "success": lambda stage, lead: stage.store.finish_job(lead, {}, [], (), None),
    "failure": lambda stage, lead: stage.store.fail_job(lead, PROBLEM),
    "cancellation": lambda stage, lead: stage.store.cancel_job(lead),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_seat_ends_with_the_attempt_that_it_is_a_part_of(end: str, stage: Stage, lead: Claim) -> None:
    taken, open_ = stage.store.open_seats(lead, 3)
    seat = stage.claim(taken, "other")
    stage.store.heartbeat(seat, LEASE)
    stage.clock.pass_(LEASE / 2)
    stage.store.heartbeat(lead, LEASE)
    ENDS[end](stage, lead)
    for write in (
        lambda: stage.store.heartbeat(seat, LEASE),
        lambda: stage.store.cancel_requested(seat),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert claim(stage, open_, "third") is None
    stage.clock.pass_(1000)
    assert not {taken, open_} & set(stage.store.due(stage.clock.moment, 100))


def test_the_next_attempt_has_seats_of_its_own(stage: Stage, lead: Claim) -> None:
    (old,) = stage.store.open_seats(lead, 2)
    stale = stage.claim(old, "other")
    stage.store.retry(lead, PROBLEM)
    again = stage.claim(lead.work_id, "leader")
    (new,) = stage.store.open_seats(again, 2)
    assert new != old
    assert stage.store.seats(lead.work_id, 1) == []
    for write in (
        lambda: stage.store.leave_seat(stale),
        lambda: stage.store.retry(stale, PROBLEM),
        lambda: stage.store.open_seats(lead, 2),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert claim(stage, new, "other") is not None


def test_a_seat_whose_worker_is_lost_is_nobody_elses(stage: Stage, lead: Claim) -> None:
    (seat,) = stage.store.open_seats(lead, 2)
    stage.claim(seat, "other")
    stage.clock.pass_(LEASE - 1)
    stage.store.heartbeat(lead, LEASE)
    stage.clock.pass_(2)
    assert [found.lost for found in stage.store.seats(lead.work_id, 1)] == [False, True]
    assert claim(stage, seat, "third") is None
    assert stage.store.next_work(["seat"], "third") is None
    stage.clock.pass_(0.5)
    assert seat not in stage.store.due(stage.clock.moment, 100)


def test_the_leader_hears_how_a_seat_ended(stage: Stage, lead: Claim) -> None:
    seats = [stage.claim(id, f"other-{id}") for id in stage.store.open_seats(lead, 4)]
    stage.store.retry(seats[0], PROBLEM)
    stage.store.release(seats[1])
    stage.store.leave_seat(seats[2])
    found = stage.store.seats(lead.work_id, 1)[1:]
    assert [(seat.problem, seat.gone, seat.lost) for seat in found] == [
        (PROBLEM, False, False),
        (None, True, False),
        (None, False, False),
    ]
    assert stage.store.get_job(ACCOUNT, lead.work_id).state is JobState.RUNNING
    assert all(claim(stage, seat.work_id, "late") is None for seat in seats)


def test_a_seat_that_nobody_took_is_rung_for_again(stage: Stage, lead: Claim) -> None:
    (seat,) = stage.store.open_seats(lead, 2)
    stage.clock.pass_(LEASE - 1)
    stage.store.heartbeat(lead, LEASE)
    assert seat in stage.store.due(stage.clock.moment, 100)


def test_cards_are_there_for_all(stage: Stage, lead: Claim) -> None:
    stage.store.open_seats(lead, 2)
    stage.store.lay_cards(lead.work_id, 1, 0, {"a": "00"})
    stage.store.lay_cards(lead.work_id, 1, 1, {"b": "01", "c": "02"})
    assert [seat.cards for seat in stage.store.seats(lead.work_id, 1)] == [{"a": "00"}, {"b": "01", "c": "02"}]
    stage.store.lay_cards(lead.work_id, 2, 0, {"d": "03"})  # of an attempt that is over, or was never made
    assert len(stage.store.seats(lead.work_id, 1)) == 2
