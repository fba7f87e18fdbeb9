import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.report.charts import CHARACTER_WIDTH, bars, fit_square, line_chart, nice_ticks, place_labels
from kellm_features.report.projection import project
from kellm_features.report.sections.behaviour import hubness


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 9
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.61, 0.69, [0.6, 0.62, 0.64, 0.66, 0.68, 0.7]),
        (3, 3, [2.8, 2.9, 3, 3.1, 3.2]),
    ],
)
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_line_chart_by_hand() -> None:
    chart = line_chart(
        "AUC", {"valid": ([1, 2, 3], [0.0, 50.0, 100.0])}, x_label="epoch", points=True, mark=(2, "kept")
    )
    assert chart is not None
    middle = ((chart.left + chart.right) / 2, (chart.top + chart.bottom) / 2)
    (line,) = chart.lines
    assert line.path == f"{chart.left}.0,{chart.bottom}.0 {middle[0]},{middle[1]} {chart.right}.0,{chart.top}.0"
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert chart.mark is not None
    assert chart.mark.at == middle[0]
    assert line.points[1][2] == "valid, 2: 50.0000"


def test_line_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart("loss", {"a": ([0, 1, 2], [1.0, math.nan, 2.0])}, x_label="step")
    assert chart is not None
    assert len(chart.lines[0].path.split()) == 2
    assert line_chart("loss", {"a": ([0], [math.nan])}, x_label="step") is None
    assert line_chart("loss", {}, x_label="step") is None


def test_bars_are_ordered_and_scaled() -> None:
    rows = bars([("b", 10, ""), ("a", 10, "n"), ("c", 40, "")], 80)
    assert [(bar.label, bar.share, bar.width) for bar in rows] == [("c", 0.5, 100), ("a", 0.125, 25), ("b", 0.125, 25)]
    assert bars([], 0) == []


@given(st.lists(st.tuples(st.floats(0, 460), st.floats(0, 460)), min_size=1, max_size=15))
def test_labels_neither_overlap_nor_leave_the_map(places: list[tuple[float, float]]) -> None:
    names = [f"Film number {n}" for n in range(len(places))]
    boxes = []
    for label in place_labels(np.array(places), names, 460):
        width = CHARACTER_WIDTH * len(label.text)
        left = label.x - {"start": 0, "end": width, "middle": width / 2}[label.anchor]
        boxes.append((left, label.y - 10, left + width, label.y + 2))
    for n, box in enumerate(boxes):
        assert box[0] >= -0.1
        assert box[2] <= 460.1
        assert all(
            box[2] <= other[0] + 0.2 or other[2] <= box[0] + 0.2 or box[3] <= other[1] + 0.2 or other[3] <= box[1] + 0.2
            for other in boxes[:n]
        )


def test_fit_square_keeps_proportions() -> None:
    fitted = fit_square(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]]), 100, 10)
    assert fitted.tolist() == [[10, 30], [90, 30], [90, 70]]


def test_projection_separates_groups_and_turns_towards_an_earlier_map() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(3, 12) * 4, 20, axis=0)
    vectors = (centres + rng.normal(size=(60, 12)) * 0.2).astype(np.float32)
    layout = project(vectors, seed=3)
    assert np.linalg.norm(layout, axis=1).max() == pytest.approx(1)
    groups = np.repeat(np.arange(3), 20)
    gaps = np.linalg.norm(layout[:, None] - layout[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert (groups[gaps.argmin(axis=1)] == groups).all()
    quarter_turn_and_mirror = np.array([[0.0, 1.0], [1.0, 0.0]]) @ np.array([[0.0, -1.0], [1.0, 0.0]])
    earlier = layout @ quarter_turn_and_mirror
    assert np.allclose(project(vectors, seed=3, like=earlier), earlier, atol=1e-6)  # the same seed, the same layout


def test_hubness_by_hand() -> None:
    """Counts 6, 2, 0, 0: mean 2, deviations 4, 0, -2, -2, variance 6, third moment (64 - 8 - 8) / 4 = 12."""
    most, top, never, skewness = hubness(np.array([2, 6]), 4)
    assert (most, top, never) == (6, 0.75, 2)
    assert skewness == pytest.approx(12 / 6**1.5)
    assert hubness(np.array([], dtype=int), 5) == (0, 0.0, 5, 0.0)
    assert hubness(np.array([3, 3]), 2)[3] == 0
