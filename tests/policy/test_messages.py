"""Requests: whatever comes in for any key is a query or a ``WireError``; sessions remember what they must and no more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusevla.policy.agent import Agent
from fusevla.policy.messages import Request, Session, Takes, parse_request
from fusevla.policy.policy import Reply
from fusevla.policy.wire import WireError
from tests.policy.robot import observation

TAKES = Takes(("base_0_rgb", "left_wrist_0_rgb"), (1, 3))
DTYPES = st.sampled_from([np.dtype(x) for x in ("?", "u1", "i8", "f2", "f8", "U3", "S3", "M8[s]")])
ANYTHING = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    st.lists(st.floats() | st.text(max_size=3) | st.none(), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
)
KEYS = st.sampled_from([*observation(), "reset", "is_warm_up", "more"])


@given(st.dictionaries(KEYS, ANYTHING, max_size=3), st.sets(KEYS, max_size=1))
def test_anything_is_a_good_request_or_refused(changed: dict[str, object], absent: set[str]) -> None:
    message = {key: value for key, value in observation(**changed).items() if key not in absent}
    try:
        request = parse_request(message, TAKES)
    except WireError:
        return
    assert request.task is not None
    assert request.task.strip()
    assert 1 <= len(request.state) <= 3
    assert np.isfinite(request.state).all()
    for image in request.images.values():
        assert image is None or (image.dtype == np.uint8 and image.shape[2] == 3 and min(image.shape) > 0)


@given(ANYTHING)
def test_anything_but_a_map_is_no_request(message: object) -> None:
    with pytest.raises(WireError, match="request: expected"):
        parse_request(message, TAKES)


@given(st.lists(st.sampled_from(["same", "other", "reset", "warm_up", "forget"]), max_size=12))
def test_a_session_begins_anew_exactly_when_told(steps: list[str]) -> None:
    session, task, fresh, seeds = Session((7, 3)), "a", True, set()
    for step in steps:
        if step == "forget":
            session, fresh = session.forgotten(), True
            continue
        task = task + "a" if step == "other" else task
        request = Request(task, reset=step == "reset", warm_up=step == "warm_up")
        query = session.query(request)
        assert (query.agent == Agent(task)) == (fresh or step != "same")
        assert query.seed not in seeds
        seeds.add(query.seed)
        session = session.after(request, Reply(query.agent.after_action(), actions=np.zeros((1, 1), np.float32)))
        fresh = step == "warm_up"
