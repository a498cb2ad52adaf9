"""Single frames of a video file, through PyAV; imported only when a set keeps its images as video."""

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["frame_times", "read_frame"]


def read_frame(path: Path, timestamp: float, fps: float) -> np.ndarray:
    """The frame shown at ``timestamp`` seconds, uint8 [H, W, 3]: seeks to the key frame before it and decodes on.

    Raises:
        ValueError: no frame within half a frame interval of ``timestamp``.
    """
    import av

    best: Any = None
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        container.seek(max(0, int((timestamp - 0.5 / fps) / stream.time_base)), stream=stream, backward=True)
        for frame in container.decode(stream):
            if best is None or abs(frame.time - timestamp) <= abs(best.time - timestamp):
                best = frame
            if frame.time >= timestamp:
                break
    if best is None or abs(best.time - timestamp) > 0.5 / fps:
        got = "none" if best is None else f"{best.time:g} s"
        raise ValueError(f"a frame at {timestamp:g} s (within {0.5 / fps:g} s) expected, the nearest is {got}")
    return np.asarray(best.to_ndarray(format="rgb24"))


def frame_times(path: Path) -> np.ndarray:
    """When each frame of a video is shown, in seconds, ascending, float64 [frames]: by decoding the whole file.

    Raises:
        Exception: what PyAV raises for a damaged file.
    """
    import av

    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        times = [frame.time for frame in container.decode(stream)]
    return np.sort(np.asarray(times, np.float64))
