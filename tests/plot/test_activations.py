"""Pictures of the two poles: what is drawn are scores and distances."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from repe import plot
from repe.reading.read import score
from tests.drawn import acts, vector


def test_the_poles_are_the_scores_of_their_texts():
    v, (positive, negative) = replace(vector(), scale=torch.full((6,), 2.0)), acts()
    for block in (None, 1):
        at = 4 if block is None else block
        for given in ({}, {"blocks": range(6)}):
            ax = plot.poles(v, positive, negative, block=block, **given)
            for name, side, right in (("positive", positive, lambda s: s > 0), ("negative", negative, lambda s: s < 0)):
                scores = score(side, v)[:, at]
                (outline,) = (p for p in ax.patches if p.get_label().startswith(name))
                covered = outline.get_xy()
                assert covered[:, 0].min() <= scores.min()
                assert covered[:, 0].max() >= scores.max() - 1e-6
                assert f"{name}: 40 texts, {right(scores).float().mean():.0%}" in outline.get_label()
                steps = covered[: len(covered) // 2 + 1]
                assert steps[1::2, 1].sum() == 40


def test_one_block_alone_and_other_blocks_than_the_vectors_are_found_by_number():
    v, (positive, negative) = vector(), acts()

    def drawn(*sides, **how):
        return [patch.get_xy().tolist() for patch in plot.poles(v, *sides, block=2, **how).patches]

    expected = drawn(positive, negative)
    assert drawn(positive[:, 2], negative[:, 2]) == expected
    assert drawn(positive[:, [2]], negative[:, [2]]) == expected
    assert drawn(positive[:, [1, 2]], negative[:, [1, 2]], blocks=[2, 1]) == expected
    for sides, how in (((positive[:, :3], negative[:, :3]), {}), ((positive, negative), {"blocks": [1, 2]})):
        with pytest.raises(ValueError, match="block 2 cannot be found among"):
            drawn(*sides, **how)
    with pytest.raises(ValueError, match=r"d_model 6\), as .* got \(40, 5\)"):
        drawn(positive[:, 2, :5], negative[:, 2, :5])


def test_poles_that_have_no_distance_have_no_picture():
    v = vector()
    with pytest.raises(ValueError, match="no distance at block 4"):
        plot.poles(replace(v, scale=torch.zeros(6)), *acts())
    assert not plt.get_fignums()


def test_pairs_of_a_vector_stand_at_their_scores_and_are_joined():
    v, (positive, negative) = vector(), acts()
    ax = plot.pairs(positive, negative, vector=v)
    for points, side in zip(ax.collections, (positive, negative), strict=True):
        np.testing.assert_allclose(points.get_offsets()[:, 0], score(side, v)[:, 4], atol=1e-6)
    joined = np.stack([line.get_xydata() for line in ax.lines[:40]])
    np.testing.assert_allclose(joined[:, 0], ax.collections[0].get_offsets())
    np.testing.assert_allclose(joined[:, 1], ax.collections[1].get_offsets())


def test_pairs_without_a_vector_keep_their_distances_where_two_directions_say_all():
    flat = torch.randn(2, 30, 2) @ torch.randn(2, 7) + 3
    ax = plot.pairs(*flat)
    places = np.concatenate([points.get_offsets() for points in ax.collections])
    every = flat.flatten(0, 1).numpy()
    for i in range(60):
        np.testing.assert_allclose(
            np.linalg.norm(places - places[i], axis=1), np.linalg.norm(every - every[i], axis=1), atol=1e-4
        )
    shares = [float(label.split("(")[1].split("%")[0]) for label in (ax.get_xlabel(), ax.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] >= shares[1]


def test_the_positive_pole_is_on_the_right():
    positive, negative = acts()
    for sides in ((positive, negative), (negative, positive)):
        first, second = plot.pairs(*sides, block=3).collections
        assert first.get_offsets()[:, 0].mean() > second.get_offsets()[:, 0].mean()


def test_pairs_need_as_many_of_either_pole_and_a_block_of_several():
    positive, negative = acts()
    with pytest.raises(ValueError, match="the poles of pairs have one shape"):
        plot.pairs(positive[:3], negative, block=2)
    with pytest.raises(ValueError, match="block None cannot be found"):
        plot.pairs(positive, negative)
