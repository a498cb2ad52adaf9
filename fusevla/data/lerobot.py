"""LeRobot folders."""

from fusevla.data.lerobot_write import EpisodeFrames, encode_image, write_lerobot_v21

__all__ = ["EpisodeFrames", "encode_image", "write_lerobot_v21"]
