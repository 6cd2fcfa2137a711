"""Who is blamed for a stand-still."""

from gristmill.parallel.heartbeat import verdict


def said(ticks: int, moves: int, what: str) -> dict:
    return {"ticks": ticks, "moves": moves, "what": what}


def test_a_rank_that_does_not_speak_is_blamed():
    before = [said(5, 9, "step 3"), said(4, 9, "step 3"), said(5, 9, "step 3")]
    now = [said(6, 9, "step 3"), said(4, 9, "step 3"), said(6, 9, "step 3")]
    found = verdict(before, now, own=0, timeout_s=60)
    assert found == ("the run has not moved for 60 s: rank 1 (last at step 3) does not answer")


def test_a_rank_that_is_behind_is_blamed():
    now = [said(6, 9, "step 3"), said(6, 8, "the hook of step 2")]
    assert "rank 1 is still at the hook of step 2, the first has come to step 3" in verdict(
        [said(5, 9, ""), said(5, 8, "")], now, own=0, timeout_s=1
    )


def test_nobody_is_blamed_alone_where_all_are_at_one_place():
    both = [said(6, 9, "computing step 3")] * 2
    found = verdict([said(5, 9, "")] * 2, both, own=1, timeout_s=1)
    assert "all ranks are at computing step 3" in found
    assert "--stall_timeout" in found
