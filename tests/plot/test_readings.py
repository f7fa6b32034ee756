"""Pictures of a text: what is drawn are its scores, and every token can be found."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from repe import plot
from repe.reading.read import Reading
from tests.drawn import check_legible, lines, names, reading


@pytest.mark.parametrize(("tokens", "blocks"), [(8, 6), (60, 6), (60, 32), (200, 80)])
def test_a_scan_can_be_read(tokens, blocks):
    r = reading(tokens, blocks)
    ax = plot.scan(r)
    np.testing.assert_array_equal(ax.images[0].get_array().data, r.scores.T)
    assert ax.figure.get_figwidth() <= 12
    check_legible(ax.figure)
    assert min(label.get_fontsize() for label in ax.get_xticklabels()) >= 6
    if tokens <= 60:
        shown = [" ".join(token.split()) or "·" for token in r.tokens]
        assert [label.get_text() for label in ax.get_xticklabels()] == shown


def test_in_narrow_axes_a_scan_names_some_of_the_tokens():
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    plot.scan(reading(), ax)
    check_legible(figure)
    assert 20 <= len(ax.get_xticklabels()) < 60


def test_a_scan_marks_the_recommended_blocks_and_what_has_no_score():
    r = reading(8)
    r.scores[:, 3] = torch.nan
    ax = plot.scan(r)
    bold = [label.get_text() for label in ax.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["1"]
    drawn = ax.images[0].cmap(ax.images[0].norm(ax.images[0].get_array()))
    np.testing.assert_allclose(drawn[3], np.tile(to_rgba("#999999"), (8, 1)), atol=0.01)
    assert not (drawn[2] == drawn[3]).all()


def test_the_line_of_a_reading_is_its_score_token_by_token():
    r = reading(12)
    for block, scores in ((None, r.best), (4, r.scores[:, 4])):
        ax = plot.tokens(r, block=block)
        (line,) = lines(ax, "honesty")
        np.testing.assert_allclose(line.get_ydata(), scores)
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(np.array(heights[:12]) + heights[12:], scores)
        assert f"at block {1 if block is None else block}" in ax.get_title()
        assert {"positive pole", "negative pole"} == set(names(ax))
    with pytest.raises(IndexError, match="block 9 was not read"):
        plot.tokens(r, block=9)
    assert len(plt.get_fignums()) == 2


def test_places_are_named_after_the_tokens_of_one_text_or_of_two():
    r = replace(reading(3, 1), recommended=(0,))
    texts = {"a": replace(r, tokens=(" a", "b", "c")), "b": replace(r, tokens=(" a", "x", "\n"))}
    ax = plot.tokens(texts)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b | x", "c | ·"]
    ax = plot.tokens(texts | {"c": replace(r, tokens=("z", "y", "c"))})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a | z", "1", "c | ·"]
    shorter = Reading("honesty", (" a",), r.blocks, r.scores[:1], r.blocks)
    assert [label.get_text() for label in plot.tokens([r, shorter]).get_xticklabels()] == ["The | a", "quick", "·"]


def test_attention_sinks_are_left_out_wherever_they_stand_and_flatten_nothing():
    r = reading(12)
    r.scores[[0, 7]] = -80
    r.sinks[[0, 7]] = True
    ax = plot.tokens(r)
    low, high = ax.get_ylim()
    assert -3 < low < -1
    assert 1 < high < 3
    (line,) = lines(ax, "honesty")
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [0, 7]
    drawn = plot.scan(r).images[0].get_array()
    assert np.flatnonzero(np.isnan(drawn.data).all(0)).tolist() == [0, 7]
    r.scores[5] = 4
    assert plot.tokens(r).get_ylim()[1] > 4


def test_a_token_without_a_score_is_a_gap_in_the_line():
    r = reading(12)
    r.scores[4] = torch.nan
    (line,) = lines(plot.tokens(r), "honesty")
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [4]
