# SPDX-License-Identifier: Apache-2.0
"""StopMatcher: what is held back, what wins, and that the cost is that of the text."""

from __future__ import annotations

import pytest

from wavetrain_engine.text.stop import StopMatch, StopMatcher


def test_holds_back_what_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("abcE") == "abc"
    assert matcher.push("N") == ""
    assert matcher.push("x") == "ENx"
    assert matcher.push("E") == ""
    assert matcher.flush() == "E"


def test_leaves_the_stop_string_out_or_in() -> None:
    assert StopMatcher(["END"]).push("abcENDdef") == StopMatch("END", "abc")
    including = StopMatcher(["END"], include_stop_str_in_output=True)
    assert including.push("abcE") == "abcE"  # nothing to hold back: it is output anyway
    assert including.push("NDdef") == StopMatch("END", "ND")


@pytest.mark.parametrize(
    ("stops", "text", "stop", "output"),
    [
        (["bc", "abc"], "xabcd", "abc", "x"),  # both end together: the longer
        (["abcd", "bc"], "xabcd", "bc", "xa"),  # the first to be complete
        (["b", "a"], "xxab", "a", "xx"),
        (["aab"], "aaab", "aab", "a"),
        (["日本"], "x日日本", "日本", "x日"),
    ],
)
def test_the_first_complete_stop_string_wins(stops: list[str], text: str, stop: str, output: str) -> None:
    assert StopMatcher(stops).push(text) == StopMatch(stop, output)


def test_restart_forgets_what_came_before() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("EN") == ""
    assert matcher.restart() == "EN"
    assert matcher.push("D") == "D"


def test_the_largest_set_of_stop_strings_costs_little() -> None:
    stops = ["a" * 1023 + chr(0x4E00 + index) for index in range(64)]
    matcher = StopMatcher(stops)
    text = "a" * 100_000
    assert len(matcher.push(text)) == len(text) - 1023
    assert matcher.push(chr(0x4E00 + 63)) == StopMatch(stops[63], "")
