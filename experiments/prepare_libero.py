"""Make a LeRobot set with reasoning annotations ready for training: validated, with statistics and a report.

    python experiments/prepare_libero.py --data DIR --annotations FILE --out data/mine
    python experiments/prepare_libero.py --preset libero10 --out data/libero-10
    python experiments/train.py --preset libero10 --data data/mine

DIR (LeRobot v2.0, v2.1 or v3.0; images in parquet or as video) is only read. The output folder is a complete set of its own,
with cot_simple.json, norm_stats.json, report.json, report.html and contact_sheet.png. When anything is wrong, nothing is
written, every defect is listed, and the exit code is 2. The same command again finds the result and does nothing.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fusevla.train.request import PUBLISHED

if TYPE_CHECKING:
    from rich.progress import Progress

    from fusevla.data.validate import Findings, Rules
    from fusevla.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """Prepare a set."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Where the prepared set goes; an earlier result there is replaced when the input has changed, nothing else ever is."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A LeRobot folder; without it the set is fetched."""
    annotations: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Reasoning annotations; by default cot_simple.json inside the data, or the published ones of a set that is fetched."""
    preset: Annotated[Literal["libero10", "libero100", "libero100-basket"] | None, tyro.conf.arg(metavar="NAME")] = None
    """libero10, libero100 or libero100-basket: the published set and annotations to fetch where none are given."""
    repo: str | None = None
    """Fetch the set from this dataset repository instead of the preset's."""
    annotations_repo: str | None = None
    """Fetch the annotations from this dataset repository."""
    annotations_folder: str | None = None
    """The folder with cot_simple.json in that repository; the preset's by default."""
    check_images: Literal["all", "sample", "none"] = "all"
    """Decode every image, a few of every episode, or none."""
    allow_missing_annotations: bool = False
    """Leave episodes without annotations out of the prepared set."""
    allow_extra_annotations: bool = False
    """Ignore annotations of episodes that the set lacks."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=COLUMN")] = ()
    """Columns that are not recognised: base_0_rgb=COLUMN, left_wrist_0_rgb=COLUMN, state=COLUMN, actions=COLUMN."""
    cameras: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ("base_0_rgb", "left_wrist_0_rgb")
    """The cameras to use."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH|train")] = None
    """For the token lengths: PaliGemma's where it is at hand or can be fetched, else a small one trained on the set's text."""
    max_token_len: int = 415
    """The limit that the lengths are held against."""
    way: Literal["copy", "link"] = "copy"
    """link: hard links instead of copies; no room and no time, but never change such a file in place."""


def main() -> None:
    """Parses the flags, then prepares."""
    from fusevla.data.prepare import PrepareError

    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        run(args)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: {error}")


def run(args: Args) -> None:
    """Fetch, look, and write; exits with 2 and the list when there are defects."""
    from fusevla.data.lerobot import LeRobotError
    from fusevla.data.prepare import PrepareError, complete_report, input_digest, occupied, source_files

    began = time.perf_counter()
    rules, out = rules_of(args), Path(args.out).expanduser().absolute()
    root, annotations = inputs(args)
    if occupied(out):
        raise PrepareError(f"--out: {out} exists and is no prepared set; name another folder, or remove it")
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents or out.resolve() in root.resolve().parents:
        raise PrepareError(f"--out: expected a folder apart from the source {root}, which is never changed; got {out}")
    files = source_files(root) if root.is_dir() else []
    settings = {**dataclasses.asdict(rules), "tokenizer": args.tokenizer, "max_token_len": args.max_token_len, "way": args.way}
    digest = input_digest(root, files, annotations, settings) if annotations.is_file() else ""
    report = complete_report(out, digest)
    if report is not None:
        print(f"{out} is ready: it was made from this very input.")
        return show(report)
    with progress() as bar:
        findings = look(root, annotations, rules, bar)
        if findings.defects:
            bar.stop()
            refuse(root, findings)
        mark = {"digest": digest, "data": str(root), "annotations": str(annotations), **settings}
        try:
            report = write(args, findings, root, files, annotations, out, mark, bar)
        except LeRobotError as error:  # an image that was not looked at
            raise PrepareError(f"{error}\nFound while drawing the report; --check-images all lists every such image.") from None
    print(f"{out} is ready, in {time.perf_counter() - began:.1f} s.")
    return show(report)


def rules_of(args: Args) -> "Rules":
    """The flags that decide what is looked at. ``PrepareError`` for a pair that is none."""
    from fusevla.data.prepare import PrepareError
    from fusevla.data.validate import Rules

    pairs = [text.partition("=") for text in args.columns]
    if bad := [name for name, equals, column in pairs if not (name and equals and column)]:
        raise PrepareError(f"--columns: expected NAME=COLUMN, got {bad}")
    columns = tuple((name, column) for name, _, column in pairs)
    return Rules(args.cameras, columns, args.check_images, args.allow_missing_annotations, args.allow_extra_annotations)


def inputs(args: Args) -> tuple[Path, Path]:
    """The set's folder and the annotations' file, fetched where they are not given."""
    from fusevla.data.hub import ANNOTATION_REPOS, fetch_annotations, fetch_set
    from fusevla.data.prepare import PrepareError

    published = PUBLISHED[args.preset] if args.preset else None
    repo = args.repo or (published.dataset if published else None)
    folder = args.annotations_folder or (published.annotations if published else None)
    if args.data is None and repo is None:
        raise PrepareError("--data DIR is needed, or --preset (or --repo) to fetch a published set")
    root = Path(args.data).expanduser().absolute() if args.data is not None else fetch_set(str(repo))
    if args.annotations is not None:
        return root, Path(args.annotations).expanduser().absolute()
    inside = root / "cot_simple.json"
    if folder is None or inside.is_file():
        return root, inside
    return root, fetch_annotations((args.annotations_repo,) if args.annotations_repo else ANNOTATION_REPOS, folder)


def progress() -> "Progress":
    """Bars with rate and time left, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def look(root: Path, annotations: Path, rules: "Rules", bar: "Progress") -> "Findings":
    """Everything that is wrong."""
    from fusevla.data.check_images import image_count
    from fusevla.data.validate import validate

    def watch(frames: Any) -> Callable[[int], None]:
        task = bar.add_task("decoding images", total=image_count(frames, rules.images))
        return lambda count: bar.advance(task, count)

    return validate(root, annotations, rules, watch)


def refuse(root: Path, findings: "Findings") -> None:
    """Lists everything and leaves."""
    lines = [f"  - {defect}" for defect in findings.defects] + [f"  (warning) {warning}" for warning in findings.warnings]
    count = f"{len(findings.defects)} defect{'s' if len(findings.defects) != 1 else ''}"
    print("\n".join([f"error: {root} cannot be prepared; {count}:", *lines, "Nothing was written."]), file=sys.stderr)
    sys.exit(2)


def write(
    args: Args,
    findings: "Findings",
    root: Path,
    files: list[Path],
    annotations: Path,
    out: Path,
    mark: dict[str, Any],
    bar: "Progress",
) -> dict[str, Any]:
    """The whole result; returns the report."""
    from fusevla.data.contact_sheet import draw_contact_sheet
    from fusevla.data.normalize import compute_norm_stats, save_norm_stats
    from fusevla.data.prepare import copy_set, file_sizes, staged, write_json
    from fusevla.data.prepare_report import write_html
    from fusevla.data.subset import drop_episodes
    from fusevla.data.summary import summarize
    from fusevla.files import write_whole

    frames, thoughts = findings.frames, findings.annotations
    assert frames is not None
    assert thoughts is not None
    positions = [i for i, episode in enumerate(frames.episodes) if episode.index not in findings.unannotated]
    tokenizer, name = tokenizer_of(args, findings)
    stats = compute_norm_stats(frames, positions)
    summary = summarize(frames, [frames.episodes[i] for i in positions], thoughts, stats, tokenizer, args.max_token_len)
    summary["text"]["tokenizer"] = name
    with staged(out) as folder:
        task = bar.add_task("copying (MB)", total=max(1, sum((root / path).stat().st_size for path in files) // 10**6))
        copy_set(root, files, folder, args.way, lambda size: bar.advance(task, size / 10**6))
        if findings.unannotated:
            drop_episodes(folder, findings.unannotated)
        write_whole(folder / "cot_simple.json", annotations.read_bytes())
        save_norm_stats(folder, stats)
        draw_contact_sheet(folder / "contact_sheet.png", frames, positions, thoughts)
        write_html(folder / "report.html", out.name, summary, findings.warnings, frames, positions, thoughts)
        report = {"input": mark, **summary, "left_out": list(findings.unannotated), "warnings": list(findings.warnings)}
        report |= {"defects": [], "files": file_sizes(folder)}
        write_json(folder / "report.json", report)
    return report


def tokenizer_of(args: Args, findings: "Findings") -> tuple["Tokenizer", str]:
    """The tokenizer for the lengths, and what to call it."""
    from fusevla.data.prepare import PrepareError
    from fusevla.presets import PI05
    from fusevla.tokens.ids import PALIGEMMA_SOURCE
    from fusevla.tokens.tokenizer import load_tokenizer
    from fusevla.train.material import make_tokenizer, set_texts

    trained = "a small one trained on the set's text"
    if args.tokenizer is None:
        try:
            return load_tokenizer(PALIGEMMA_SOURCE), "PaliGemma"
        except (FileNotFoundError, ValueError):
            trained += " (PaliGemma's is not at hand; its lengths differ)"
    choice = args.tokenizer or "train"
    assert findings.frames is not None
    try:
        tokenizer = make_tokenizer(choice, set_texts(findings.frames, findings.annotations), PI05)
    except (FileNotFoundError, ValueError) as error:
        raise PrepareError(f"--tokenizer: {error}") from None
    return tokenizer, trained if choice == "train" else choice


def show(report: dict[str, Any]) -> None:
    """The summary, in a few lines."""
    samples, text = report["samples_per_epoch"], report["text"]
    segments = ", ".join(f"{entry['segments']} {kind}" for kind, entry in report["segments"].items())
    clipped = ", ".join(f"{share:.1%}" for share in report["state"]["clipped_share"])
    flat = {name: found for name, found in report["degenerate_dimensions"].items() if found}
    print(f"  {report['version']}: {report['episodes']} episodes, {report['frames']} frames at {report['fps']:g} per second")
    print(f"  {len(report['tasks'])} tasks; segments: {segments}")
    print(f"  expected per epoch: {samples['share']['reason']:.1%} reason, {samples['share']['act']:.1%} act")
    print(f"  tokens: longest {max(text['longest'].values())} of {text['max_token_len']} ({text['tokenizer']})")
    print(f"  state clipped by the bins, by dimension: {clipped}")
    print(f"  dimensions without spread: {flat or 'none'}")
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    print("  report.html, report.json and contact_sheet.png are in it")


if __name__ == "__main__":
    main()
