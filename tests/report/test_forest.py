import pytest
from hypothesis import given
from hypothesis import strategies as st

from kellm_features.report.forest import AXIS, HEAD, LONGEST, NOTE, ROW, Measure, Panel, axis_of, forest_chart

finite = st.floats(-1e3, 1e3)


def test_rows_and_panels_by_hand() -> None:
    measures = [Measure(-1.0, -2.0, 0.0, "bad", "-1"), None, Measure(1.0, 0.0, 2.0, "good", "+1")]
    chart = forest_chart(
        "t", [("one", ["a", "b"]), ("", ["c"])], [Panel("left", measures, zero=0.0), Panel("r", [None] * 3)], note="n"
    )
    assert chart is not None
    assert [(name.text, name.is_heading) for name in chart.names] == [
        ("one", True), ("a", False), ("b", False), ("c", False),
    ]  # fmt: skip
    assert [name.y for name in chart.names] == [HEAD + ROW * (n + 0.5) for n in range(4)]
    assert (chart.bottom, chart.height) == (HEAD + 4 * ROW, HEAD + 4 * ROW + AXIS + NOTE)
    panel, empty = chart.panels
    low, high = panel.marks
    assert (low.y, high.y) == (chart.names[1].y, chart.names[3].y)
    middle = (panel.left + panel.right) / 2
    assert panel.zero == pytest.approx(middle, abs=0.1)
    assert low.at + high.at == pytest.approx(2 * middle, abs=0.2)
    assert low.high == high.low == panel.zero
    assert (low.tone, low.text, low.full) == ("bad", "-1", "-1.0000 [-2.0000, 0.0000]")
    assert empty.marks == ()
    assert panel.right < empty.left < empty.right < chart.width


def test_a_row_far_off_becomes_an_arrow_and_leaves_the_axis_to_the_others() -> None:
    measures = [Measure(-0.058, -0.06, -0.05), Measure(0.003, 0.002, 0.004), Measure(0.001, -0.001, 0.002)]
    assert axis_of(measures, 0.0) == (-0.001, 0.004)
    chart = forest_chart("t", [("", ["far", "b", "c"])], [Panel("", measures, zero=0.0)])
    assert chart is not None
    far, near, _ = chart.panels[0].marks
    assert (far.beyond, far.at, far.low, far.high) == ("left", chart.panels[0].left, None, None)
    assert near.beyond == ""
    assert {tick.label for tick in chart.panels[0].ticks} >= {"0.000", "0.002"}


def test_bars_begin_at_zero_and_none_is_cut() -> None:
    measures = [Measure(0.4, 0.3, 0.5), Measure(0.01), Measure(0.012)]
    chart = forest_chart("t", [("", ["a", "b", "c"])], [Panel("recall", measures, bars=True)])
    assert chart is not None
    (panel,) = chart.panels
    lengths = [mark.at - panel.left for mark in panel.marks]
    assert panel.zero == panel.left
    assert lengths[0] / lengths[1] == pytest.approx(40, rel=0.05)
    assert not any(mark.beyond for mark in panel.marks)


@given(st.lists(st.tuples(finite, finite, finite).map(sorted), min_size=1, max_size=12), st.booleans())
def test_everything_drawn_is_inside_its_panel(triples: list[list[float]], has_zero: bool) -> None:
    measures = [Measure(value, low, high) for low, value, high in triples]
    names = [f"arm {n}" * (n + 1) for n in range(len(measures))]
    chart = forest_chart("t", [("g", names)], [Panel("p", measures, zero=0.0 if has_zero else None)] * 2)
    assert chart is not None
    assert all(len(name.text) <= LONGEST for name in chart.names)
    for panel in chart.panels:
        assert len(panel.marks) == len(measures)
        places = [x for mark in panel.marks for x in (mark.low, mark.at, mark.high) if x is not None]
        places += [tick.at for tick in panel.ticks] + ([panel.zero] if panel.zero is not None else [])
        assert all(panel.left <= x <= panel.right for x in places)
        for mark in panel.marks:
            assert mark.low is None or mark.high is None or mark.low <= mark.at <= mark.high
            assert chart.top < mark.y < chart.bottom


def test_nothing_to_draw_and_rows_that_do_not_match() -> None:
    assert forest_chart("t", [("g", ["a"])], [Panel("p", [None])]) is None
    assert forest_chart("t", [], [Panel("p", [])]) is None
    assert axis_of([None]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="panel 'p' has 1 measures for 2 rows"):
        forest_chart("t", [("g", ["a", "b"])], [Panel("p", [Measure(1.0)])])
