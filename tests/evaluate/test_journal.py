"""The journal of an evaluation: every outcome comes back, a cut-off line does not hurt, other settings are refused."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.evaluate.journal import EPISODES, Journal
from fusevla.evaluate.outcome import Outcome, ThoughtRecord, Ticket, from_line, to_line

SETTINGS = {"world": "toy", "step": 3}
text = st.text(max_size=20)
maybe = st.none() | st.booleans()
keys = st.lists(st.integers(), min_size=1, max_size=3).map(tuple)
fields = st.fixed_dictionaries(
    {"task": text, "group": text, "success": st.booleans(), "steps": st.integers(0, 600), "wanted": st.none() | text}
    | {"grasps": st.lists(st.tuples(text, st.none() | text), max_size=3), "malformed": st.integers(0, 10)}
    | {"swapped_to": st.none() | text, "film": st.none() | text}
)
thoughts = st.lists(st.tuples(st.integers(0, 600), text, maybe, maybe), max_size=3)
decisions = st.dictionaries(st.tuples(text, text), st.integers(1, 9), max_size=3)


@given(keys, st.sampled_from([None, "plan", "due"]), st.booleans(), thoughts, decisions, fields)
def test_an_outcome_survives_its_line(key, swap, record, thoughts, decisions, fields) -> None:
    said = [ThoughtRecord(*thought) for thought in thoughts]
    outcome = Outcome(Ticket(key, swap, record), thoughts=said, decisions=Counter(decisions), **fields)
    line = to_line(outcome)
    assert "\n" not in line
    assert from_line(line) == outcome


def filled(folder: Path, count: int = 3) -> Journal:
    journal = Journal(folder, SETTINGS)
    journal.begin()
    for number in range(count):
        journal.add(Outcome(Ticket((number,)), steps=number))
    return journal


def test_an_evaluation_goes_on_with_what_there_is(tmp_path: Path) -> None:
    there = filled(tmp_path / "e")
    assert Journal(tmp_path / "e", SETTINGS).outcomes == there.outcomes
    assert [outcome.steps for outcome in there.outcomes.values()] == [0, 1, 2]


def test_a_line_cut_off_anywhere_is_played_again_and_the_others_stay(tmp_path: Path) -> None:
    filled(tmp_path / "e")
    path = tmp_path / "e" / EPISODES
    whole = path.read_bytes()
    begins = whole[:-1].rindex(b"\n") + 1
    for end in (begins + 1, (begins + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        journal = Journal(tmp_path / "e", SETTINGS)
        assert sorted(ticket.key for ticket in journal.outcomes) == [(0,), (1,)]
        journal.add(Outcome(Ticket((2,)), steps=2))
        assert path.read_bytes() == whole


def test_other_settings_and_other_folders_are_refused_untouched(tmp_path: Path) -> None:
    filled(tmp_path / "e")
    with pytest.raises(ValueError, match=r"holds an evaluation with \{'step': 3\}, not \{'step': 4\}"):
        Journal(tmp_path / "e", SETTINGS | {"step": 4})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no evaluation to go on with"):
        Journal(tmp_path / "photos", SETTINGS)
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    with pytest.raises(ValueError, match="is no evaluation"):
        Journal(tmp_path / "photos" / "a.jpg", SETTINGS)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "e")
    path = tmp_path / "e" / EPISODES
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{}\n" + lines[2])
    with pytest.raises(ValueError, match=r"episodes\.jsonl: line 2 is no episode"):
        Journal(tmp_path / "e", SETTINGS)


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert filled(tmp_path, 1).outcomes == {Ticket((0,)): dataclasses.replace(Outcome(Ticket((0,))))}
