"""How fast the input pipeline is, beside LeRobotDataset with torch's DataLoader on the same set.

    python experiments/bench_data.py --data DIR --workers 2 --json bench.json

Ours is complete: decode every camera, choose the thought, tokenise, resize to 224, make batches with action chunks.
The reference (pip install "fusevla[lerobot]") decodes the same images and makes batches, in three forms:

    with chunks   action chunks from delta_timestamps on the actions alone, as its users train policies: this is ``ratio``;
                  lerobot decodes the images of every frame of the chunk for it. No resizing, no text.
    as read       kinder: no action chunk either, only what LeRobotDataset gives by itself (``ratio_as_read``)
    resized       as read, the images resized as in ours by torchvision, antialiased, to uint8 (``ratio_resized``)

Windows of the pipelines alternate and medians are given, since other work on the machine disturbs both. "Per core" divides by
the processor time of this process and its workers. lerobot reads v3.0 only: a v2.1 folder is copied and converted with its own
converter, in a temporary folder.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from fusevla.data.samples import SampleSource

KEYS = {"as read": "reference_as_read", "resized": "reference_resized", "with chunks": "reference"}
"""Forms of the reference, and what their figures are called."""
CHUNK_BATCHES, CHUNK_REPEATS = 2, 3
"""Batches of a window ``with chunks``, and windows: it is slow."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the input pipeline."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A LeRobot folder (v2.0, v2.1 or v3.0)."""
    workers: int = 0
    """Worker processes, of both sides; with 0 ours uses two threads and the reference one: compare the figures per core."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures to this file as well."""
    annotations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Reasoning annotations; by default cot_simple.json inside the data, and without reasoning where there is none."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH|train")] = "train"
    """A SentencePiece model, or a small one made from the set's text."""
    frame_cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Ours reads frames from this cache (train.py --frame-cache), which is filled first."""
    batch: int = 32
    """Samples per batch."""
    batches: int = 16
    """Batches per window."""
    repeats: int = 5
    """Windows of each pipeline."""
    reference: bool = True
    """Measure LeRobotDataset too, where it is installed."""


Pipeline = Callable[[int], contextlib.AbstractContextManager[Iterator[Any]]]
"""Starts reading in an order that the number decides."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What one window of a pipeline took."""

    first_batch: float
    """Seconds until the first batch."""
    rate: float
    """Samples per second after the prefetched ones are used up."""
    per_core: float
    """Samples per second of processor time, of this process and its workers."""


def make_source(args: Args) -> "SampleSource":
    """The samples of the libero presets."""
    from rich.console import Console
    from rich.progress import track

    from fusevla.data.annotations import load_annotations
    from fusevla.data.batch import SampleSource
    from fusevla.data.lerobot import open_set
    from fusevla.data.normalize import compute_norm_stats
    from fusevla.data.samples import used_cameras
    from fusevla.presets import LIBERO10
    from fusevla.train.material import make_tokenizer, set_texts, with_vocabulary

    file = args.annotations or args.data / "cot_simple.json"
    reasoning = args.annotations is not None or file.is_file()
    cache = None if args.frame_cache is None else str(args.frame_cache)
    data = dataclasses.replace(LIBERO10.data, use_reasoning=reasoning, frame_cache=cache)
    frames = open_set(args.data, cameras=used_cameras(data))
    annotations = load_annotations(file) if reasoning else None
    tokenizer = make_tokenizer(args.tokenizer, set_texts(frames, annotations), LIBERO10.model)
    model = with_vocabulary(LIBERO10, tokenizer.vocab_size).model
    source = SampleSource(frames, annotations, tokenizer, compute_norm_stats(frames), data, model)
    if args.frame_cache is not None:
        for index in track(range(len(source)), "filling the frame cache", console=Console(stderr=True), transient=True):
            source(index, 0, 0)
    return source


def ours(args: Args, source: "SampleSource") -> Pipeline:
    """The pipeline that training uses."""
    from fusevla.data.batch import collate
    from fusevla.data.loader import make_loader

    buckets = source.data.text_buckets
    return lambda seed: make_loader(
        source, lambda samples: collate(samples, buckets), batch_size=args.batch, seed=seed, workers=args.workers
    )


def reference(args: Args, root: Path, form: str, fps: float, size: int, horizon: int) -> Pipeline:
    """LeRobotDataset and DataLoader with their defaults, shuffled."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms import v2

    torch.set_num_threads(1)  # as in its workers: for single images its threads only wait for each other
    deltas = {_action_column(root): [step / fps for step in range(horizon)]} if form == "with chunks" else None
    resize = v2.Compose([v2.Resize((size, size), antialias=True), v2.ToDtype(torch.uint8, scale=True)])
    transforms = resize if form == "resized" else None
    dataset = LeRobotDataset("local/bench", root=root, delta_timestamps=deltas, image_transforms=transforms)

    @contextlib.contextmanager
    def start(seed: int) -> Iterator[Iterator[Any]]:
        order = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=args.batch, shuffle=True, generator=order, num_workers=args.workers, drop_last=True
        )
        yield itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    return start


def _action_column(root: Path) -> str:
    from fusevla.data.lerobot_columns import find_column

    return find_column("actions", json.loads((root / "meta/info.json").read_text())["features"])


def as_v30(root: Path, version: str, folder: Path) -> Path:
    """The set itself where lerobot can read it, else a copy in ``folder`` that lerobot converted. ValueError for v2.0."""
    if version == "v3.0":
        return root
    if version != "v2.1":
        raise ValueError(f"lerobot neither reads nor converts {version}")
    import shutil

    from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

    shutil.copytree(root, folder / "set", copy_function=shutil.copyfile)
    for path in (folder / "set").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    convert_dataset("set", root=folder, push_to_hub=False)
    return folder / "set"


def measure(pipeline: Pipeline, seed: int, batch: int, batches: int, workers: int) -> Window:
    """One window: what was prefetched before the clock starts is not counted."""
    started = time.perf_counter()
    with pipeline(seed) as loader:
        next(loader)
        first = time.perf_counter() - started
        for _ in range(2 * workers + 2):
            next(loader)
        started, used = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(loader)
        elapsed, used = time.perf_counter() - started, cpu_seconds() - used
    return Window(first, batches * batch / elapsed, batches * batch / used)


def cpu_seconds() -> float:
    """Processor time so far of this process and its living workers (those only where there is /proc)."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def augmentation(args: Args, source: "SampleSource") -> dict[str, float]:
    """Milliseconds per sample on the device, all cameras, compiled."""
    import jax

    from fusevla.data.batch import collate
    from fusevla.presets import LIBERO10
    from fusevla.train.step import augment_batch

    batch = jax.device_put(collate([source(i, 0, 0) for i in range(min(args.batch, len(source)))], source.data.text_buckets))
    run = jax.jit(lambda batch, key: augment_batch(batch, key, LIBERO10.train.augment).observation.images)
    times = []
    for seed in range(args.repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run(batch, jax.random.key(seed)))
        times.append(time.perf_counter() - started)
    return {"augmentation_ms_per_sample": 1e3 * statistics.median(times[1:]) / len(batch.actions)}


def run(args: Args) -> dict[str, Any]:
    """Everything; returns the figures."""
    import fusevla.train.job  # noqa: F401  (the time to import what every run imports is not the pipeline's)

    began = time.perf_counter()
    source = make_source(args)
    pipelines = {"ours": ours(args, source)}
    with pipelines["ours"](0) as loader:
        next(loader)
        first_batch = time.perf_counter() - began
    with contextlib.ExitStack() as stack:
        missing = add_reference(args, source, pipelines, stack) if args.reference else None
        windows = alternate(args, pipelines)
    figures = {
        "data": str(args.data),
        "version": source.frames.version,  # type: ignore[attr-defined]
        "frames": len(source),
        "cameras": len(source.cameras),
        "workers": args.workers,
        "frame_cache": args.frame_cache is not None,
        "batch": args.batch,
        **summarize(windows),
        "first_batch_seconds": first_batch,
        "without_reference": missing,
    }
    return figures | augmentation(args, source)


def add_reference(args: Args, source: "SampleSource", pipelines: dict[str, Pipeline], stack: contextlib.ExitStack) -> str | None:
    """Adds the reference's pipelines; returns why there is none."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_data_")))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    try:
        import lerobot  # noqa: F401
    except ImportError:
        return 'lerobot is not installed: pip install "fusevla[lerobot]" measures the other side too'
    try:
        frames: Any = source.frames
        root = as_v30(frames.root, frames.version, folder)
        for form in KEYS:
            size, horizon = source.model.vision.image_size, source.model.action_horizon
            pipelines[form] = reference(args, root, form, frames.fps, size, horizon)
    except Exception as error:  # lerobot's own troubles are no reason to lose our figures
        return f"lerobot cannot read this set ({type(error).__name__}: {error})"
    return None


def alternate(args: Args, pipelines: dict[str, Pipeline]) -> dict[str, list[Window]]:
    """The windows of each pipeline, taken in turn."""
    windows: dict[str, list[Window]] = {name: [] for name in pipelines}
    for repeat in range(args.repeats):
        for name, pipeline in pipelines.items():
            if name == "with chunks" and repeat >= CHUNK_REPEATS:
                continue
            batches = CHUNK_BATCHES if name == "with chunks" else args.batches
            windows[name].append(measure(pipeline, repeat, args.batch, batches, args.workers))
    return windows


def summarize(windows: dict[str, list[Window]]) -> dict[str, float | None]:
    """Medians, and ratios of medians."""

    def median(name: str, field: str) -> float | None:
        found = [getattr(window, field) for window in windows.get(name, ())]
        return statistics.median(found) if found else None

    rate, per_core = median("ours", "rate"), median("ours", "per_core")
    figures = {"samples_per_second": rate, "samples_per_second_per_core": per_core}
    for form, key in KEYS.items():
        figures[f"{key}_samples_per_second"] = other = median(form, "rate")
        figures[f"{key}_samples_per_second_per_core"] = other_core = median(form, "per_core")
        suffix = key.removeprefix("reference")
        figures[f"ratio{suffix}"] = rate / other if rate and other else None
        figures[f"ratio{suffix}_per_core"] = per_core / other_core if per_core and other_core else None
    return figures


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    from fusevla.evaluate.bench import publish, show

    publish(lambda: run(args), show, args.json)


if __name__ == "__main__":
    main()
