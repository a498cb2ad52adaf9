import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusevla.data.lerobot import open_set
from fusevla.data.normalize import (
    Method,
    NormStats,
    array_stats,
    compute_norm_stats,
    degenerate,
    load_norm_stats,
    normalize,
    save_norm_stats,
    stats_from_json,
    stats_to_json,
    unnormalize,
)
from tests.data import lerobot_sets as sets

ROOT = Path(__file__).parents[2]
CANDIDATES = [os.environ.get("FUSEVLA_GOLDEN"), ROOT.parent / "shared/golden", ROOT / "tests/golden"]
METHODS: tuple[tuple[Method, str], ...] = (("quantile", "quantile"), ("zscore", "zscore"))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    for folder in CANDIDATES:
        if folder and (Path(folder) / "small.npz").is_file():
            values = np.load(Path(folder) / "small.npz")
            return {name.removeprefix("norm/"): values[name] for name in values if name.startswith("norm/")}
    pytest.skip("no golden small.npz")


@pytest.fixture
def golden_stats(golden: dict[str, np.ndarray]) -> NormStats:
    return NormStats(*(golden[field].astype(np.float64) for field in ("mean", "std", "q01", "q99")))


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_formulas_agree_with_the_goldens(
    golden: dict[str, np.ndarray], golden_stats: NormStats, method: Method, name: str
) -> None:
    """``clip_degenerate=False``: the reference lets the constant dimension explode."""
    for case, x in (("state", golden["x"]), ("actions", golden["actions"])):
        expected = golden[f"{name}_{case}"]
        ours = normalize(x, golden_stats, method, clip_degenerate=False)
        assert ours.dtype == np.float32
        for dimension in range(x.shape[-1]):
            close(ours[..., dimension], expected[..., dimension])
        close(unnormalize(x, golden_stats, method), golden[f"un{name}_{case}"])
    narrow = golden[f"{name}_narrow"]
    close(normalize(golden["x"][:, : narrow.shape[-1]], golden_stats, method), narrow)
    close(unnormalize(golden["x_wide"], golden_stats, method), golden[f"un{name}_wide"])


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_only_the_constant_dimension_differs_from_the_goldens(
    golden: dict[str, np.ndarray], golden_stats: NormStats, method: Method, name: str
) -> None:
    constant = degenerate(golden_stats, method)
    np.testing.assert_array_equal(constant, golden["data"].std(axis=0) == 0)
    ours = normalize(golden["x"], golden_stats, method)
    close(ours[:, ~constant], golden[f"{name}_state"][:, ~constant])
    assert np.abs(ours[:, constant]).max() <= 1


def test_moments_agree_with_the_goldens_and_quantiles_are_exact(golden: dict[str, np.ndarray]) -> None:
    """The reference estimates quantiles from histograms; ours are those of the data."""
    stats = array_stats(golden["data"])
    close(stats.mean, golden["mean"])
    close(stats.std, golden["std"])
    assert stats.q01 is not None
    assert stats.q99 is not None
    np.testing.assert_allclose(stats.q01, np.quantile(golden["data"], 0.01, axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats.q99, np.quantile(golden["data"], 0.99, axis=0), rtol=1e-6)


ARRAYS = hnp.arrays(np.float32, (20, 3), elements=st.floats(-1000, 1000, width=32))


@pytest.mark.parametrize("method", ["quantile", "zscore"])
@given(values=ARRAYS)
def test_round_trip(method: Method, values: np.ndarray) -> None:
    stats = array_stats(values)
    free = ~degenerate(stats, method)
    back = unnormalize(normalize(values.astype(np.float64), stats, method), stats, method)
    np.testing.assert_allclose(back[:, free], values[:, free], atol=1e-6)


@given(values=ARRAYS)
def test_quantiles_map_to_plus_and_minus_one(values: np.ndarray) -> None:
    stats = array_stats(values)
    assert stats.q01 is not None
    assert stats.q99 is not None
    free = ~degenerate(stats)
    np.testing.assert_allclose(normalize(stats.q01, stats)[free], -1, atol=1e-6)
    np.testing.assert_allclose(normalize(stats.q99, stats)[free], 1, atol=0.2)  # 1e-6 against a range of 1e-5 or more


@given(level=st.floats(-1e4, 1e4, width=32), other=st.floats(-1e4, 1e4, width=32))
@pytest.mark.parametrize("method", ["quantile", "zscore"])
def test_constant_dimensions_stay_bounded_and_come_back(method: Method, level: float, other: float) -> None:
    stats = array_stats(np.full((50, 1), level, np.float32))
    assert degenerate(stats, method).all()
    seen = normalize(np.array([level, other], np.float32)[:, None], stats, method)
    assert np.abs(seen).max() <= 1
    assert seen[0, 0] == (-1 if method == "quantile" else 0)
    np.testing.assert_allclose(unnormalize(seen, stats, method), level, atol=2e-6, rtol=1e-6)


def test_rare_values_of_a_nearly_constant_dimension() -> None:
    """A gripper that opens in less than 1% of the frames has q01 == q99."""
    values = np.full((1000, 1), -1.0, np.float32)
    values[:5] = 1.0
    seen = normalize(values, array_stats(values))
    assert set(seen.ravel().tolist()) == {-1.0, 1.0}


def test_wrong_widths_and_missing_quantiles() -> None:
    moments = NormStats(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="3 dimensions cannot normalise"):
        normalize(np.zeros((2, 4)), moments, "zscore")
    np.testing.assert_array_equal(unnormalize(np.full((1, 4), 2.0), moments, "zscore")[:, 3], [2.0])
    with pytest.raises(ValueError, match="no quantiles"):
        normalize(np.zeros((2, 3)), moments)


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.array([[np.nan]]), np.array([[np.inf]])])
def test_statistics_of_nothing_or_of_nan_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite values"):
        array_stats(values)


def test_statistics_of_a_set_and_of_some_episodes(tmp_path: Path) -> None:
    data = open_set(sets.write(tmp_path / "set"))
    written = sets.episodes()
    whole = compute_norm_stats(data)
    np.testing.assert_allclose(whole["actions"].mean, np.concatenate([e.actions for e in written]).mean(axis=0), atol=1e-6)
    some = compute_norm_stats(data, [0, 2])["state"]
    rows = np.concatenate([written[0].state, written[2].state])
    np.testing.assert_allclose(some.std, rows.std(axis=0), rtol=1e-5)
    assert some.q99 is not None
    np.testing.assert_allclose(some.q99, np.quantile(rows, 0.99, axis=0), rtol=1e-5)


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path: Path) -> None:
    """Rows of thousands of episodes once were as many arrays of the whole set's length: 23 GB for libero-100."""
    data = open_set(sets.write(tmp_path / "set"))
    tracemalloc.start()
    try:
        compute_norm_stats(data, [0, 1, 2] * 400)
        once, before = tracemalloc.get_traced_memory()[1], data.state
        data.state, data.actions = (np.resize(x, (len(x) * 400, x.shape[1])) for x in (data.state, data.actions))
        tracemalloc.reset_peak()
        compute_norm_stats(data, [0, 1, 2] * 400)
        grown = tracemalloc.get_traced_memory()[1] - data.state.nbytes - data.actions.nbytes
    finally:
        tracemalloc.stop()
    assert before.nbytes < data.state.nbytes
    assert grown < 2 * once


def test_file_round_trip_is_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stats = {"state": array_stats(rng.normal(size=(30, 8))), "actions": NormStats(rng.normal(size=7), rng.uniform(size=7))}
    path = save_norm_stats(tmp_path, stats)
    assert path == tmp_path / "norm_stats.json"
    for loaded in (load_norm_stats(path), load_norm_stats(tmp_path), stats_from_json(stats_to_json(stats))):
        assert list(loaded) == ["state", "actions"]
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(loaded["state"], field), getattr(stats["state"], field))
        assert loaded["actions"].q01 is None


def test_openpi_file_is_read_and_written_alike(tmp_path: Path) -> None:
    folders = [Path(folder) / "norm_stats_example" for folder in CANDIDATES if folder]
    source = next((folder for folder in folders if folder.is_dir()), None)
    if source is None:
        pytest.skip("no golden norm_stats_example")
    stats = load_norm_stats(source)
    assert len(stats["state"].mean) == 10
    assert stats["actions"].q01 is None
    assert json.loads(save_norm_stats(tmp_path, stats).read_text()) == json.loads((source / "norm_stats.json").read_text())


GOOD: dict[str, Any] = {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": [0.0, 0.0], "q99": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected"),
        ({"norm_stats": {}}, "expected"),
        ({"norm_stats": {"state": 3}}, "state must be an object"),
        ({"norm_stats": {"state": GOOD | {"mean": "x"}}}, "state.mean must be a list"),
        ({"norm_stats": {"state": GOOD | {"mean": None}}}, "state.mean must be a list"),
        ({"norm_stats": {"state": GOOD | {"std": [1.0, float("nan")]}}}, "state.std must be a list of finite"),
        ({"norm_stats": {"state": GOOD | {"q01": [0.0]}}}, "one length"),
        ({"norm_stats": {"state": GOOD | {"q99": None}}}, "both or neither"),
        ({"norm_stats": {"state": GOOD | {"q99": [-1.0, 1.0]}}}, "q99 not below q01"),
        ({"norm_stats": {"state": GOOD | {"std": [-1.0, 1.0]}}}, "std must not be negative"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        load_norm_stats(path)
    assert str(path) in str(caught.value)


def test_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"norm_stats.json"):
        load_norm_stats(tmp_path)
    (tmp_path / "norm_stats.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_norm_stats(tmp_path)
