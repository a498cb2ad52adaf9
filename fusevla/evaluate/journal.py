"""A folder of closed-loop episodes that an interrupted evaluation is continued in: its settings, and a line for each episode."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusevla.evaluate.outcome import Outcome, Ticket, from_line, to_line
from fusevla.files import write_whole

__all__ = ["Journal"]

SETTINGS = "settings.json"
EPISODES = "episodes.jsonl"


class Journal:
    """``folder/settings.json`` and ``folder/episodes.jsonl``; ``outcomes`` holds all that ended.

    Nothing is written before ``begin``.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begins, or goes on where an evaluation with the same settings stopped. ``settings`` must survive JSON.

        Raises:
            ValueError: the folder holds something else, or an evaluation with other settings; nothing is touched then.
        """
        self.folder, self._settings, self.outcomes = folder, dict(settings), dict[Ticket, Outcome]()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            self._check()
            self._read()

    def begin(self) -> None:
        """Makes the folder."""
        write_whole(self.folder / SETTINGS, (json.dumps(self._settings, indent=1) + "\n").encode())

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome, even if the machine stops right afterwards."""
        self.outcomes[outcome.ticket] = outcome
        with (self.folder / EPISODES).open("a", encoding="utf-8") as file:
            file.write(to_line(outcome) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self) -> None:
        try:
            there = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder}: exists and is no evaluation to go on with; name another, or remove it") from error
        settings = self._settings
        other = {key for key in {*there, *settings} if there.get(key) != settings.get(key)}
        if other:
            was, now = ({key: source.get(key) for key in sorted(other)} for source in (there, settings))
            raise ValueError(f"{self.folder}: holds an evaluation with {was}, not {now}; name another folder, or remove it")

    def _read(self) -> None:
        """A line that was cut off by the interruption is taken away; its episode is played again."""
        path = self.folder / EPISODES
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                outcome = from_line(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is no episode ({error}); remove it to play that one again") from error
            self.outcomes[outcome.ticket] = outcome
        if whole != content:
            write_whole(path, whole)
