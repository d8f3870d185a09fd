"""Commands killed in each phase end as if nobody had disturbed them; more by `python tests/kill.py`."""

import kill


def test_six_killed_commands_end_with_the_same_bits():
    found = list(kill.kills(6, seed=0, light=True))
    assert [outcome for *_, outcome in found] == ["same"] * 6, found
    assert [aimed for aimed, *_ in found] == list(kill.ORDER[:6])
    assert sum(aimed == hit for aimed, hit, *_ in found) >= 4, "most hit the phase they were meant for"
