"""Which column of a LeRobot set is which camera, the state or the actions."""

from collections.abc import Collection, Iterable, Sequence

__all__ = ["find_column"]

KNOWN = {
    "state": ("state", "observation.state", "observation/state", "states", "observation.states"),
    "actions": ("actions", "action"),
    "base_0_rgb": (
        "image",
        "image_1",
        "base_image",
        "exterior_image_1_left",
        "agentview_rgb",
        "agentview_image",
        "top",
        "front",
        "base",
        "cam_high",
    ),
    "left_wrist_0_rgb": (
        "wrist_image",
        "image_wrist_1",
        "wrist_image_1",
        "image_wrist",
        "wrist_image_left",
        "left_wrist_image",
        "eye_in_hand_rgb",
        "robot0_eye_in_hand_image",
        "wrist",
        "left_wrist",
        "cam_left_wrist",
        "image2",
    ),
    "right_wrist_0_rgb": (
        "image_wrist_2",
        "wrist_image_2",
        "wrist_image_right",
        "right_wrist_image",
        "right_wrist",
        "cam_right_wrist",
    ),
}
"""Names seen in published sets, the most specific first; each also with a prefix from PREFIXES."""
PREFIXES = ("", "observation.images.", "observation.image.", "observation.", "observation/", "images.")


def find_column(name: str, available: Collection[str], configured: Iterable[Sequence[str]] = ()) -> str:
    """The column of ``available`` that holds ``name`` (a camera, ``state`` or ``actions``).

    ``configured`` are (name, column) pairs that win over the known names.

    Raises:
        ValueError: no such column; the message lists what there is and how to say which one is meant.
    """
    for key, column in configured:
        if key == name:
            if column not in available:
                raise ValueError(f"columns says that {name!r} is column {column!r}; the set has {sorted(available)}.")
            return column
    for candidate in (name, *KNOWN.get(name, ())):
        for prefix in PREFIXES:
            if prefix + candidate in available:
                return prefix + candidate
    remedy = f"Name it with columns=(({name!r}, COLUMN), ...)."
    raise ValueError(f"no column is recognised as {name!r}; the set has {sorted(available)}. {remedy}")
