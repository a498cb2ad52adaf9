"""Small sets with annotations, and random damage to them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusevla.data.lerobot import open_set
from tests.data import lerobot_sets as sets
from tests.references_text import episode_record

LENGTHS = (62, 70)
"""Long enough for the annotated record of ``references_text``, whose last segment starts at frame 60."""


def write_sets(folder: Path) -> list[Path]:
    """The same two episodes as v2.0, v2.1 and v3.0, each with annotations and stored statistics."""
    made = sets.write_lerobot_v21(folder / "v21", sets.episodes(LENGTHS, size=4))
    roots = [sets.as_v20(made, folder / "v20"), made, sets.as_v30(made, folder / "v30", row_group_size=40)]
    loaded = open_set(made)
    stats = {
        name: {moment: getattr(values, moment)(axis=0).tolist() for moment in ("min", "max", "mean")}
        for name, values in (("state", loaded.state), ("actions", loaded.actions))
    }
    for root in roots:
        (root / "cot_simple.json").write_text(json.dumps(annotations()))
        if root != made:
            (root / "meta/stats.json").write_text(json.dumps(stats))
    return roots


def annotations(count: int = len(LENGTHS)) -> dict[str, Any]:
    text = json.dumps(episode_record())
    return {str(i): json.loads(text.replace("put the red block in the bowl", f"task number {i % 2}")) for i in range(count)}


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def corrupt(root: Path, random: np.random.Generator) -> str:
    """Damages one thing in a set and says which."""
    kind = KINDS[random.integers(len(KINDS))]
    return f"{kind.__name__}: {kind(root, random)}"


def _pick(random: np.random.Generator, items: list[Any]) -> Any:
    return items[random.integers(len(items))]


def _bytes(root: Path, random: np.random.Generator) -> str:
    """Some bytes changed, blanked, cut off, removed or put in."""
    path = _pick(random, files_of(root))
    data = path.read_bytes()
    at, size = int(random.integers(len(data))), int(_pick(random, [1, 1, 4, 64, 1000]))
    noise = random.bytes(size)
    how = _pick(random, ["change", "change", "blank", "cut", "remove", "insert"])
    end = {"insert": at, "cut": len(data)}.get(how, at + size)
    middle = {"change": noise[: len(data[at:end])], "blank": bytes(len(data[at:end])), "insert": noise}.get(how, b"")
    path.write_bytes(data[:at] + middle + data[end:])
    return f"{how} {size} at {at} of {path.name}"


def _file(root: Path, random: np.random.Generator) -> str:
    """A file gone, empty, in another's place, or a folder."""
    path, other = _pick(random, files_of(root)), _pick(random, files_of(root))
    how = _pick(random, ["gone", "empty", "swapped", "folder"])
    if how == "swapped":
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "empty":
            path.write_bytes(b"")
    return f"{path.name} {how} ({other.name})"


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    1 << 40,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "0",
    "\ud800",
    [],
    {},
]
VALUES += [
    [0],
    [[1]],
    {"0": 1},
    "{x}",
    "../x",
    "a/b\0",
    "v3.0",
    "v2.1",
    "image",
    "video",
    [4, 4, 3],
    [8],
    "{episode_index:099999d}",
]


def _places(node: Any) -> list[tuple[Any, Any]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in [(node, key), *_places(child)]]


def _json(root: Path, random: np.random.Generator) -> str:
    """A value of a JSON file replaced, dropped or moved to another key."""
    path = _pick(random, [p for p in files_of(root) if p.suffix in (".json", ".jsonl")])
    lines = path.suffix == ".jsonl"
    document: Any = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    node, key = _pick(random, _places(document))
    how = _pick(random, ["replace", "replace", "drop", "double"])
    old = node[key]
    if how == "replace":
        node[key] = _pick(random, VALUES)
    elif how == "drop":
        del node[key]
    elif isinstance(node, list):
        node.append(old)
    else:
        node[_pick(random, ["0", "x", "end_step", "length", "user_answer"])] = old
    path.write_text("\n".join(map(json.dumps, document)) if lines else json.dumps(document))
    return f"{how} {key!r} of {path.name} ({old!r:.60})"


def _table(root: Path, random: np.random.Generator) -> str:
    """A column of a parquet file dropped, of another type, in another order, or with a value that is none."""
    path = _pick(random, [p for p in files_of(root) if p.suffix == ".parquet"])
    table = pq.read_table(path)
    name = _pick(random, table.column_names)
    at, column = table.column_names.index(name), table[name]
    how = _pick(random, ["drop", "nulls", "text", "rows", "nan", "reverse", "repeat"])
    if how in ("reverse", "repeat") and name in ("image", "wrist_image", "state", "actions"):
        how = "nulls"  # nothing in the set could tell
    values: list[Any] = column.to_pylist()
    row = int(random.integers(len(values)))
    if how == "drop":
        table = table.remove_column(at)
    elif how == "text":
        table = table.set_column(at, name, pa.array(["x"] * len(values)))
    elif how == "rows":
        table = table.slice(0, row)
    else:
        value = values[row]
        bad: Any = None
        if how == "nan" and isinstance(value, list) and value and isinstance(value[0], float):
            bad = [float("nan"), *value[1:]]
        values = {"reverse": values[::-1], "repeat": [values[0]] * len(values)}.get(how, [*values[:row], bad, *values[row + 1 :]])
        table = table.set_column(at, name, pa.array(values, column.type))
    pq.write_table(table, path)
    return f"{how} {name} of {path.name}"


KINDS: list[Callable[[Path, np.random.Generator], str]] = [_bytes, _bytes, _file, _json, _json, _json, _table]


def copy(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root, folder))
