"""Pictures of vectors: where a concept is read, and how vectors lie to each other."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import repe
from repe import plot
from tests.drawn import check_legible, contrast, legend, lines, names, vector


def test_a_profile_is_the_accuracy_of_every_block_and_marks_those_recommended():
    v = vector()
    ax = plot.profile(v)
    bars = {bar.get_x() + bar.get_width() / 2: bar for bar in ax.patches}
    heights = [bars[block].get_height() for block in sorted(bars)]
    np.testing.assert_allclose(heights, v.accuracy.numpy())
    assert [block for block, bar in bars.items() if bar.get_alpha() is None and bar.get_facecolor()[3] == 1] == [4]
    assert legend(ax) == ["recommended"]
    assert names(ax) == ["chance"]


def test_a_profile_of_many_blocks_can_be_read():
    for blocks in (2, 6, 32, 80):
        check_legible(plot.profile(vector(blocks)).figure)


def test_a_profile_without_held_out_pairs_has_no_bars():
    v = vector()
    ax = plot.profile(replace(v, accuracy=torch.full((6,), torch.nan)))
    ax.figure.canvas.draw()


def test_profiles_of_several_are_a_line_each_by_name():
    one, other = vector(), replace(vector(), accuracy=torch.linspace(1, 0.5, 6), recommended=(0,))
    ax = plot.profile({"mean": one, "_pca": other})
    for name, v in (("mean", one), (" _pca", other)):
        (line,) = lines(ax, name)
        np.testing.assert_allclose(line.get_xydata(), np.stack([v.blocks, v.accuracy], 1))
    rings = [tuple(line.get_xydata()[0]) for line in lines(ax, "recommended")]
    assert rings == [(4, pytest.approx(0.88)), (0, 1)]
    assert legend(ax) == ["mean", " _pca", "recommended"]


def test_lines_that_are_the_same_are_both_seen():
    ax = plot.profile([vector(), vector()])
    widths = [lines(ax, name)[0].get_linewidth() for name in ("honesty", "honesty (2)")]
    assert widths[0] > 2 * widths[1]


def test_several_of_one_concept_are_told_apart_by_their_readers():
    made = [replace(vector(), provenance={"reader": reader}) for reader in ("mean", "pca", "pca")]
    assert legend(plot.profile(made))[:3] == ["honesty, mean", "honesty, pca", "honesty, pca (2)"]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.profile([])


def concepts(count: int = 3, blocks: int = 4) -> list[repe.ConceptVector]:
    like = vector(blocks)
    drawn = [repe.ConceptVector.random(like, seed) for seed in range(count)]
    return [replace(v, concept=f"concept {i}") for i, v in enumerate(drawn)]


def test_cosines_are_those_of_the_vectors_and_stand_in_the_cells():
    several = concepts()
    for block in (None, 0):
        ax = plot.cosines(several, block=block)
        at = several[0].recommended[0] if block is None else block
        expected = [[one.cosine(other)[at].item() for other in several] for one in several]
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
        assert names(ax) == [f"{value + 0:.2f}".replace("-0.00", "0.00") for row in expected for value in row]
        assert [label.get_text() for label in ax.get_yticklabels()] == [v.concept for v in several]
        assert f"block {at}" in ax.get_title()
        assert ax.images[0].get_clim() == (-1, 1)


def test_a_cosine_of_nearly_nothing_has_no_sign():
    tilted = torch.tensor([[1.0, -0.001], [0.0, 1.0]])
    tilted /= tilted.norm(dim=1, keepdim=True)
    v = replace(vector(2), write=tilted, read=tilted, recommended=(0,))
    assert names(plot.cosines(v)) == ["1.00", "0.00", "0.00", "1.00"]


def test_one_vector_is_compared_with_itself_block_by_block():
    v = concepts()[0]
    ax = plot.cosines(v)
    np.testing.assert_allclose(ax.images[0].get_array(), v.write @ v.write.T, atol=1e-6)
    with pytest.raises(ValueError, match="compared block by block"):
        plot.cosines([v], block=1)


def test_what_is_read_can_be_compared_too():
    v = vector(3)
    read = v.write + torch.tensor([0.0, 1.0, 0.0])
    other = replace(v, concept="other", read=read / (read * v.write).sum(-1, keepdim=True))
    assert plot.cosines([v, other], block=0).images[0].get_array()[0, 1] == pytest.approx(1)
    ax = plot.cosines([v, other], block=0, direction="read")
    assert ax.images[0].get_array()[0, 1] == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="'write' and 'read', got 'both'"):
        plot.cosines([v, other], direction="both")


def test_vectors_of_other_models_or_without_the_block_are_refused_and_leave_no_figure():
    with pytest.raises(ValueError, match="d_model is 4 and 6"):
        plot.cosines([vector(4), replace(vector(6), recommended=(2,))], block=2)
    with pytest.raises(IndexError, match="no block 9"):
        plot.cosines(concepts(), block=9)
    assert not plt.get_fignums()


def test_letters_in_cells_can_be_read_on_their_ground():
    ax = plot.cosines(concepts(6, 12))
    image = ax.images[0]
    for text, value in zip(ax.texts, image.get_array().flat, strict=True):
        assert contrast(to_rgba(text.get_color()), image.cmap(image.norm(value))) > 4.5


def test_numbers_of_many_blocks_do_not_touch():
    check_legible(plot.cosines(repe.ConceptVector.random(vector(36))).figure)
