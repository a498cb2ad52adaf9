"""Flags of train.py that save memory: what a preset does not do yet, from harmless to costly. Imports nothing heavy."""

import dataclasses
from collections.abc import Sequence

from fusevla.presets import PRESETS, TINY, Preset


@dataclasses.dataclass(frozen=True)
class Lever:
    """A flag that saves memory, and what it costs."""

    name: str
    value: str | int
    costs: str

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name} {self.value}"

    def pull(self, preset: Preset) -> Preset:
        """The preset with it."""
        part = "model" if self.name == "remat" else "train"
        changed = dataclasses.replace(getattr(preset, part), **{self.name: self.value})
        return dataclasses.replace(preset, **{part: changed})


def levers(preset: Preset, parts: Sequence[int] = ()) -> list[Lever]:
    """What the preset does not do yet; ``parts`` are the numbers to accumulate that are worth a try."""
    model, train = preset.model, preset.train
    found = [] if model.remat == "full" else [Lever("remat", "full", "up to a third more time")]
    found += [Lever("accumulate", number, "parts take turns") for number in parts]
    lora = model.language.lora is not None or model.action.lora is not None
    tower_trains, some_rest = train.freeze != "all_but_lora", train.freeze != "none" and lora
    moments = _after(("float32", "bfloat16", "int8"), train.moments) if tower_trains else ()
    found += [Lever("moments", kind, "rounds the tower's moments") for kind in moments]
    bases = _after(("bf16", "int8", "nf4"), train.base) if some_rest else ()
    found += [Lever("base", kind, "rounds frozen weights") for kind in bases]
    if tower_trains and lora:
        found.append(Lever("freeze", "all_but_lora", "the image tower does not learn"))
    return found


def _after(kinds: Sequence[str], now: str) -> Sequence[str]:
    return kinds[kinds.index(now) + 1 :]


def divisors(samples: int, above: int = 1) -> list[int]:
    """Into how many equal parts a device's samples can be divided, more than ``above``; ascending."""
    return [parts for parts in range(above + 1, samples + 1) if samples % parts == 0]


def plan_flags(preset: Preset) -> list[str]:
    """For plan_memory.py: the preset's name, its batch, and what else it does differently from the preset of that name."""
    named, train = PRESETS.get(preset.name, preset), preset.train
    flags = [f"--preset {preset.name}", f"--batch {train.batch_size}"]
    for name in ("freeze", "base", "moments", "accumulate", "flow_draws"):
        value = getattr(train, name)
        flags += [f"--{name.replace('_', '-')} {value}"] if value != getattr(named.train, name) else []
    adapted = preset.model.language.lora is not None
    flags += [f"--lora {adapted}"] if adapted != (named.model.language.lora is not None) else []
    flags += ["--model tiny"] if preset.model.vision == TINY.vision else []
    return flags + ([f"--remat {preset.model.remat}"] if preset.model.remat != named.model.remat else [])
