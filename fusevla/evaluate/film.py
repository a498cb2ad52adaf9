"""Episodes as films: what the cameras saw, with the thought of the moment written under it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusevla.arrays import UInt8

__all__ = ["caption", "write_film"]

LINES = 6
FONT_SIZE = 13
LINE_HEIGHT = 17
MARGIN = 6


def caption(image: UInt8[np.ndarray, "h w 3"], text: str, width: int = 480) -> UInt8[np.ndarray, "_ width 3"]:
    """The image scaled to ``width`` without smoothing, and the text on a strip of ``LINES`` lines below. Sizes are even."""
    height = round(image.shape[0] * width / image.shape[1])
    height += height % 2
    page = Image.new("RGB", (width, height + LINES * LINE_HEIGHT + 2 * MARGIN), "white")
    page.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (0, 0))
    lines = "\n".join(line.strip() for line in text.splitlines()[:LINES])
    ImageDraw.Draw(page).multiline_text(
        (MARGIN, height + MARGIN), lines, fill="black", font=ImageFont.load_default(FONT_SIZE), spacing=LINE_HEIGHT - FONT_SIZE
    )
    return np.asarray(page)


def write_film(path: Path, frames: Sequence[tuple[UInt8[np.ndarray, "h w 3"], str]], fps: int) -> None:
    """An mp4 (H.264) that browsers play, one captioned frame for each (image, text)."""
    import av

    pages = [caption(image, text) for image, text in frames]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "movflags": "faststart"})
        stream.height, stream.width, _ = pages[0].shape
        stream.pix_fmt = "yuv420p"
        for page in pages:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
        container.mux(stream.encode())
