"""A preset from JSON: what a checkpoint says about the run that wrote it."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fusevla.presets import Preset


def _from_json(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if get_origin(kind) in (Union, UnionType):
        return _from_json(next(arm for arm in get_args(kind) if arm is not NoneType), value)
    if get_origin(kind) is tuple:
        return tuple(_from_json(get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{getattr(kind, '__name__', kind)}: unknown fields {unknown}; written by a newer version?")
        return kind(**{name: _from_json(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    return value


def preset_from_dict(values: dict[str, Any]) -> Preset:
    """The inverse of ``dataclasses.asdict`` after a trip through JSON (absent fields take their defaults)."""
    preset: Preset = _from_json(Preset, values)
    return preset
