"""Records of ``cot_simple.json``: which thought is due when, in the words of ``prompts``."""

import itertools
from collections.abc import Sequence
from typing import Any

from fusevla.data.prompts import initial_content, plan_thought, with_instruction

__all__ = ["episode_annotation"]


def episode_annotation(task: str, plans: Sequence[str], thinks: Sequence[tuple[int, int]], length: int) -> dict[str, Any]:
    """An episode's record: think in the intervals ``thinks``, act between them.

    Args:
        task: The instruction.
        plans: Its sub-goals in order.
        thinks: [start, end) in frames of one more thought than there are plans, the last end being -1; or, for an episode
            that is only looked at, (0, -1) alone.
        length: Frames.

    Raises:
        ValueError: another number of thoughts, or intervals that are empty, overlap or lie beyond the episode.
    """
    if len(thinks) not in (1, len(plans) + 1) or thinks[0][0] != 0 or thinks[-1][1] != -1:
        raise ValueError(
            f"episode_annotation: expected {len(plans) + 1} thoughts from frame 0 to the end (-1), got {list(thinks)}"
        )
    edges = [edge for start, end in thinks for edge in (start, length if end == -1 else end)]
    if any(after <= before for before, after in itertools.pairwise(edges)) or any(end == -1 for _, end in thinks[:-1]):
        raise ValueError(f"episode_annotation: expected intervals in order within {length} frames, got {list(thinks)}")
    contents = [initial_content(task)]
    contents += [with_instruction(task, plan_thought(plans, done)) for done in range(len(plans) + 1)]
    segments = list[dict[str, Any]]()
    for number, (start, end) in enumerate(thinks):
        after = {"updated_content": plan_thought(plans, number), "updated_content_w_instruction": contents[number + 1]}
        segments.append(_segment(start, end, contents[number]) | after)
        if end != -1:
            segments.append(_segment(end, thinks[number + 1][0], contents[number + 1]) | _outdated(segments[-2:-1]))
    return {"episode_start_interval": [0, edges[1]], "segments": segments}


def _segment(start: int, end: int, content: str) -> dict[str, Any]:
    return {
        "start_step": start,
        "end_step": end,
        "reference_start_step": 0,
        "reference_end_step": end if start == 0 else start,
        "content": content,
        "updated_content": None,
    }


def _outdated(before: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Where the thought before still held: the act segment before, if there is one."""
    return {f"outdated_reference_{edge}": segment[edge] for segment in before for edge in ("start_step", "end_step")}
