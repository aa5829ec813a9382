# SPDX-License-Identifier: Apache-2.0
"""Stop strings, matched on text that comes in chunks.

All stop strings are followed at once by one Aho-Corasick automaton (Aho and Corasick 1975, "Efficient
string matching"), so the cost is that of the text, however many strings there are. Its depth says how
much of the text's end may still become a stop string: that much is held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found.

    Attributes:
        stop: the stop string.
        text: what `push` had not returned yet and belongs to the output.
    """

    stop: str
    text: str


class StopMatcher:
    """Finds the first stop string to be complete; of two that end together, the longer one. Not thread-safe.

    The result depends on the text alone, never on how it is cut into chunks.
    """

    __slots__ = ("_automaton", "_held", "_includes_stop", "_state")

    def __init__(self, stops: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        self._automaton = _Automaton(stops)
        self._includes_stop = include_stop_str_in_output
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """Takes more text; returns what is certain to be output, or the match. Nothing may follow a match."""
        state, match = self._automaton.run(self._state, text)
        self._state = state
        buffer = self._held + text
        if match is not None:
            stop, end = match
            end += len(self._held)
            self._held = ""
            return StopMatch(stop, buffer[: end if self._includes_stop else end - len(stop)])
        # A stop string that is to be part of the output needs no holding back.
        num_held = 0 if self._includes_stop else self._automaton.depths[state]
        border = len(buffer) - num_held
        self._held = buffer[border:]
        return buffer[:border]

    def would_match(self, text: str) -> bool:
        """Whether `push(text)` would return a match. Changes nothing."""
        return self._automaton.run(self._state, text)[1] is not None

    def restart(self) -> str:
        """Returns what was held back and forgets it: no later match reaches into it."""
        text, self._held, self._state = self._held, "", 0
        return text

    flush = restart


class _Automaton:
    """States are numbers, 0 the root; `depths[state]` is the length of the text that led there."""

    __slots__ = ("_children", "_ends", "_failures", "depths")

    def __init__(self, stops: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._ends: list[str | None] = [None]
        self.depths: list[int] = [0]
        for stop in stops:
            self._add(stop)
        self._failures = [0] * len(self.depths)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, 1):
            following = self._children[state].get(char)
            if following is None:
                following = len(self.depths)
                self._children[state][char] = following
                self._children.append({})
                self._ends.append(None)
                self.depths.append(depth)
            state = following
        self._ends[state] = stop

    def _link(self) -> None:
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            failure = self._failures[state]
            if self._ends[state] is None:
                self._ends[state] = self._ends[failure]
            for char, child in self._children[state].items():
                target = failure
                while target and char not in self._children[target]:
                    target = self._failures[target]
                self._failures[child] = self._children[target].get(char, 0)
                queue.append(child)

    def run(self, state: int, text: str) -> tuple[int, tuple[str, int] | None]:
        """Follows the text; returns the state and, where a stop string ends, it and its end in the text."""
        children, failures, ends = self._children, self._failures, self._ends
        for position, char in enumerate(text, 1):
            while state and char not in children[state]:
                state = failures[state]
            state = children[state].get(char, 0)
            stop = ends[state]
            if stop is not None:
                return state, (stop, position)
        return state, None
