"""Fetches published sets and annotations from the Hugging Face hub, where there is a network."""

from collections.abc import Sequence
from pathlib import Path

from fusevla.data.prepare import PrepareError
from fusevla.files import cache_folder

__all__ = ["ANNOTATION_REPOS", "fetch_annotations", "fetch_set"]

ANNOTATION_REPOS = ("nvidia/libero-r-datasets", "nvidia/libero_r_dataset")
"""Both names have been seen; they are tried in this order."""


def fetch_set(repo: str) -> Path:
    """The folder of a dataset repository in our cache; a second call fetches only what is new. ``PrepareError`` says why not."""
    return _fetch(repo, None, "give a local folder with --data DIR")


def fetch_annotations(repos: Sequence[str], folder: str) -> Path:
    """``folder/cot_simple.json`` from the first of the repositories that has it. ``PrepareError`` lists why none does."""
    problems = []
    for repo in repos:
        try:
            file = _fetch(repo, f"{folder}/*", "give a local file with --annotations FILE") / folder / "cot_simple.json"
        except PrepareError as error:
            problems.append(str(error))
            continue
        if file.is_file():
            return file
        problems.append(f"{repo}: expected {folder}/cot_simple.json, found none")
    raise PrepareError("\n".join(problems))


def _fetch(repo: str, pattern: str | None, remedy: str) -> Path:
    import huggingface_hub

    folder = cache_folder() / "hub" / repo
    try:
        huggingface_hub.snapshot_download(repo_id=repo, repo_type="dataset", local_dir=str(folder), allow_patterns=pattern)
    except Exception as error:  # the client's own errors and those of whatever it connects with
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PrepareError(
            f"{repo}: could not be fetched from the hub ({reason}); {remedy}, or name another repository"
        ) from None
    return folder
