"""What every edit promises of an activation, proven on the score, the plane or the norm that it speaks of."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from repe.ops import Coefficients
from repe.ops import edit as apply
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit
from repe.steering.kinds import KINDS, UNITS, loreft

D, BLOCKS = 16, 3
ON = torch.ones(1, 1)
CLOSE = {"atol": 3e-5, "rtol": 3e-5}


def concept(seed: int = 0, oblique: bool = True, **changes) -> ConceptVector:
    """A random concept; where oblique, it is read along another direction than it is written along."""
    generator = torch.Generator().manual_seed(seed)
    write, other, center = torch.randn(3, BLOCKS, D, generator=generator)
    write = write / write.norm(dim=-1, keepdim=True)
    read = write + oblique * 0.5 * (other - (other * write).sum(-1, keepdim=True) * write)
    scale, sigma, norm, accuracy, separation = 0.5 + torch.rand(5, BLOCKS, generator=generator)
    given = {
        "scale": scale,
        "sigma": sigma,
        "norm": 9 * norm,
        "accuracy": accuracy.clamp(max=1),
        "separation": separation,
        "dose": scale,
    }
    fields = {"write": write, "read": read, "center": center, "dose": scale, **given, **changes}
    return ConceptVector(f"concept {seed}", tuple(range(BLOCKS)), (1,), **fields)


class Dimensions(NamedTuple):
    d_model: int
    n_blocks: int


SHAPE = Dimensions(D, BLOCKS)


def constants_at(edit: Edit, block: int) -> Coefficients:
    return edit.on(SHAPE).constants[block]


def activations(n: int = 7) -> Tensor:
    return 3 * torch.randn(2, n, D, generator=torch.Generator().manual_seed(9))


def edited(
    x: Tensor, vectors: ConceptVector | Sequence[ConceptVector], edit: str, alpha: float = 1.0,
    block: int = 1, n_blocks: int = 1, unit: str = "kl", **options,
) -> Tensor:  # fmt: skip
    where = [block] if n_blocks == 1 else list(range(n_blocks))
    return apply(x, alpha * ON, constants_at(Edit.of(vectors, edit=edit, unit=unit, blocks=where, **options), block))


def score(x: Tensor, v: ConceptVector, block: int = 1) -> Tensor:
    return ((x.double() @ v.read[block].double() - v.midpoint[block].double()) / v.scale[block].double()).float()


def orthonormal(*vectors: ConceptVector, block: int = 1) -> np.ndarray:
    """Gram and Schmidt in float64: an orthonormal row for every write direction, in their order."""
    rows: list[np.ndarray] = []
    for v in vectors:
        row = v.write[block].double().numpy()
        row = row - sum(((row @ r) * r for r in rows), np.zeros(D))
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


# add


@pytest.mark.parametrize("alpha", [-2.5, 0.1, 1.0, 7.0])
def test_add_adds_the_displacement_exactly_once(alpha):
    x, v = activations(), concept()
    moved = edited(x, v, "add", alpha) - x
    torch.testing.assert_close(moved, (alpha * v.scale[1] * v.write[1]).expand_as(x), **CLOSE)
    torch.testing.assert_close(score(x + moved, v) - score(x, v), torch.full(x.shape[:2], alpha), **CLOSE)


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
@pytest.mark.parametrize("unit", UNITS)
def test_a_length_is_shared_out_over_the_blocks_unless_it_is_raw(unit, n_blocks):
    x, v = activations(), concept(dose=torch.tensor([2.0, 3.0, 5.0]))
    length = {"kl": v.dose, "gap": v.scale, "raw": torch.ones(BLOCKS), "sigma": v.sigma, "norm": v.norm}[unit]
    share = 1 if unit == "raw" else 1 / n_blocks
    if unit == "kl":  # the same part of the way everywhere, so that the doses sum to 1
        length = v.scale / (v.scale / v.dose)[:n_blocks].sum()
        share = 1
    for block in range(n_blocks):
        moved = edited(x, v, "add", -2.0, block if n_blocks > 1 else 0, n_blocks, unit) - x
        torch.testing.assert_close(moved, (-2 * share * length[block] * v.write[block]).expand_as(x), **CLOSE)


def test_adding_two_concepts_adds_both():
    x, one, two = activations(), concept(1), concept(2)
    expected = x + 0.5 * (one.displacement + two.displacement)[1]
    torch.testing.assert_close(edited(x, [one, two], "add", 0.5), expected, **CLOSE)


def test_an_edit_knows_the_length_of_a_step():
    v = concept()
    step, norm = Edit.of(v, blocks=[0, 1]).on(SHAPE).lengths[1]
    assert step == pytest.approx(v.scale[1].item() / 2)
    assert norm == pytest.approx(v.norm[1].item())


# ablate


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ablation_leaves_no_projection_on_any_direction(n):
    x, vectors = activations(), [concept(i) for i in range(n)]
    for v in vectors:
        assert (edited(x, vectors, "ablate") @ v.read[1]).abs().max() < 2e-5
    torch.testing.assert_close(
        edited(edited(x, vectors, "ablate"), vectors, "ablate"), edited(x, vectors, "ablate"), **CLOSE
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ablation_of_reading_directions_is_the_orthogonal_projection(n):
    x, vectors = activations(), [concept(i, oblique=False) for i in range(n)]
    rows = orthonormal(*vectors)
    expected = x.double().numpy() @ (np.eye(D) - rows.T @ rows)
    np.testing.assert_allclose(edited(x, vectors, "ablate"), expected, atol=2e-5)


def test_oblique_ablation_moves_along_write_only():
    x, v = activations(), concept()
    moved = (edited(x, v, "ablate") - x)[0].double().numpy()
    along = orthonormal(v)[0]
    np.testing.assert_allclose(moved, np.outer(moved @ along, along), atol=2e-6)


def test_half_an_ablation_leaves_half():
    x, v = activations(), concept()
    torch.testing.assert_close(edited(x, v, "ablate", 0.5) @ v.read[1], x @ v.read[1] / 2, **CLOSE)


# clamp, cap, floor, erase


@pytest.mark.parametrize("target", [-1.0, 0.0, 2.5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_clamp_sets_every_score(target, n):
    x, vectors = activations(), [concept(i) for i in range(n)]
    clamped = edited(x, vectors, "clamp", target=target)
    for v in vectors:
        torch.testing.assert_close(score(clamped, v), torch.full(x.shape[:2], target), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("edit", "bound"), [("cap", torch.minimum), ("floor", torch.maximum)])
def test_cap_and_floor_move_only_what_is_beyond(edit, bound):
    x, v, target = activations(40), concept(), 0.3
    before, bounded = score(x, v), edited(x, v, edit, target=target)
    expected = bound(before, torch.tensor(target))
    torch.testing.assert_close(score(bounded, v), expected, atol=1e-4, rtol=1e-4)
    within = (before == expected)[..., None].expand_as(x)
    assert 0 < within.float().mean() < 1
    assert torch.equal(bounded[within], x[within])


def test_erasing_leaves_a_classifier_at_chance():
    v, labels = concept(), torch.arange(400) % 2
    noise = torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    poles = v.center[1] + (2.0 * labels - 1)[:, None] * v.displacement[1] + 0.1 * noise
    erased = edited(poles[None], v, "erase")[0]
    assert score(erased, v).abs().max() < 1e-4

    def accuracy(x: Tensor) -> float:
        scores = score(x, v)[:, None].numpy()
        return LogisticRegression().fit(scores[:200], labels[:200]).score(scores[200:], labels[200:])

    assert accuracy(poles) > 0.9
    assert accuracy(erased) == pytest.approx(0.5, abs=0.1)


def test_erasing_keeps_everything_at_right_angles_to_write():
    x, v = activations(), concept()
    along = orthonormal(v)[0]
    rest = np.eye(D) - np.outer(along, along)
    np.testing.assert_allclose(edited(x, v, "erase").numpy() @ rest, x.numpy() @ rest, atol=1e-5)


# rotate, angle


def in_plane(x: Tensor, plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length and angle of the part in a plane."""
    p = x.double().numpy() @ plane.T
    return np.hypot(p[..., 0], p[..., 1]), np.arctan2(p[..., 1], p[..., 0])


def turned(angle: np.ndarray) -> np.ndarray:
    """An angle, or a difference of angles, as a point: free of whole turns."""
    return np.stack([np.cos(angle), np.sin(angle)])


def outside(x: Tensor, plane: np.ndarray) -> np.ndarray:
    return x.double().numpy() @ (np.eye(D) - plane.T @ plane)


@pytest.mark.parametrize("theta", [-3.0, -0.2, 1e-3, math.pi / 2, math.pi, 5.0])
def test_rotation_turns_by_theta_and_keeps_the_rest(theta):
    x, pair = activations(), [concept(1), concept(2)]
    plane, rotated = orthonormal(*pair), edited(x, pair, "rotate", theta=theta)
    (length, before), (length_after, after) = in_plane(x, plane), in_plane(rotated, plane)
    np.testing.assert_allclose(length_after, length, atol=2e-5)
    np.testing.assert_allclose(turned(after - before), turned(np.full_like(before, theta)), atol=2e-4)
    np.testing.assert_allclose(outside(rotated, plane), outside(x, plane), atol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), **CLOSE)
    torch.testing.assert_close(edited(rotated, pair, "rotate", theta=-theta), x, **CLOSE)


def test_rotation_goes_from_the_first_towards_the_second():
    first, second = concept(1), concept(2)
    x = first.write[1].expand(1, 1, D)
    expected = torch.from_numpy(orthonormal(first, second)[1]).float()
    torch.testing.assert_close(edited(x, [first, second], "rotate", theta=math.pi / 2)[0, 0], expected, **CLOSE)


@pytest.mark.parametrize("theta", [-2.0, 0.0, 1.0, math.pi])
def test_angle_sets_the_angle_and_keeps_the_length(theta):
    x, pair = activations(), [concept(1), concept(2)]
    plane, aimed = orthonormal(*pair), edited(x, pair, "angle", theta=theta)
    (length, _), (length_after, after) = in_plane(x, plane), in_plane(aimed, plane)
    np.testing.assert_allclose(length_after, length, rtol=1e-4)
    np.testing.assert_allclose(turned(after), turned(np.full_like(after, theta)), atol=1e-4)
    np.testing.assert_allclose(outside(aimed, plane), outside(x, plane), atol=1e-5)


# piecewise, LoReFT, norms


def test_piecewise_pushes_away_from_zero_on_either_side():
    x, v = activations(40), concept()
    sign = torch.sign(x @ v.read[1])
    assert {-1.0, 1.0} == set(sign.flatten().tolist())
    expected = x + 1.5 * sign[..., None] * v.displacement[1]
    torch.testing.assert_close(edited(x, v, "piecewise", 1.5), expected, **CLOSE)
    in_raw = edited(x, v, "piecewise", 1.5, unit="raw")
    torch.testing.assert_close(in_raw, x + 1.5 * sign[..., None] * v.write[1], **CLOSE)


def test_loreft_is_the_formula_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(D, 3, generator=generator))[0].T
    weight, bias = torch.randn(3, D, generator=generator), torch.randn(3, generator=generator)
    x = activations()
    edited = apply(x, ON, loreft(rotation, weight, bias))
    R, W, b = (t.double().numpy() for t in (rotation, weight, bias))
    for token, result in zip(x.double().numpy().reshape(-1, D), edited.reshape(-1, D), strict=True):
        np.testing.assert_allclose(result, token + R.T @ (W @ token + b - R @ token), atol=2e-5)
    # with orthonormal rows, what is read along them becomes what was learned
    torch.testing.assert_close(edited @ rotation.T, x @ weight.T + bias, **CLOSE)


@pytest.mark.parametrize("edit", KINDS)
def test_every_edit_can_keep_the_norm(edit):
    x, pair = activations(), [concept(1), concept(2)]
    vectors = pair if edit in ("rotate", "angle") else pair[0]
    options = {"target": 0.5} if edit in ("clamp", "cap", "floor") else {}
    options |= {"theta": 2.0} if edit in ("rotate", "angle") else {}
    kept = edited(x, vectors, edit, 2.0, keep_norm=True, **options)
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1), **CLOSE)
    free = edited(x, vectors, edit, 2.0, **options)
    torch.testing.assert_close(kept / kept.norm(dim=-1, keepdim=True), free / free.norm(dim=-1, keepdim=True), **CLOSE)


@pytest.mark.parametrize("edit", KINDS)
def test_the_shortcut_without_a_projection_changes_nothing(edit):
    vectors = [concept(1), concept(2)] if edit in ("rotate", "angle") else concept()
    constants = constants_at(Edit.of(vectors, edit=edit, blocks=1, **options_of(edit)), 1)
    assert constants.needs_projection == (edit != "add")
    everything = Coefficients(*constants.tensors, gain=constants.gain, keep_norm=constants.keep_norm)
    torch.testing.assert_close(apply(activations(), ON, constants), apply(activations(), ON, everything))


def options_of(edit: str) -> dict[str, float]:
    needed = {"clamp": "target", "cap": "target", "floor": "target", "rotate": "theta", "angle": "theta"}
    return {needed[edit]: 1.0} if edit in needed else {}


# what cannot be meant


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("ad", r"edit='ad' is not known \(did you mean 'add'\?\): use one of \['add', 'ablate', 'clamp'"),
        ("ablation", r"did you mean 'ablate'"),
        ("xyz", r"edit='xyz' is not known: use one of"),
        (None, r"edit=None is not known: use one of"),
    ],
)
def test_an_unknown_edit_says_what_there_is(edit, message):
    with pytest.raises(ValueError, match=message):
        Edit.of(concept(), edit=edit)


def test_an_unknown_unit_says_what_there_is():
    with pytest.raises(
        ValueError, match=r"unit='nats' is not known: use one of \['kl', 'gap', 'sigma', 'norm', 'raw'\]"
    ):
        Edit.of(concept(), unit="nats")


@pytest.mark.parametrize("edit", [e for e in KINDS if e not in ("add", "piecewise")])
@pytest.mark.parametrize("unit", [u for u in UNITS if u != "kl"])
def test_an_edit_without_a_length_takes_no_unit(edit, unit):
    with pytest.raises(ValueError, match=f"edit='{edit}' takes no unit: leave it out, or choose another edit"):
        Edit.of(concept(), edit=edit, unit=unit, **options_of(edit))


@pytest.mark.parametrize("edit", [e for e in KINDS if e not in ("clamp", "cap", "floor")])
def test_a_target_is_refused_where_it_would_be_ignored(edit):
    with pytest.raises(ValueError, match=f"edit='{edit}' takes no target"):
        Edit.of(concept(), edit=edit, target=0.0)


@pytest.mark.parametrize("edit", [e for e in KINDS if e not in ("rotate", "angle")])
def test_an_angle_is_refused_where_it_would_be_ignored(edit):
    with pytest.raises(ValueError, match=f"edit='{edit}' takes no theta"):
        Edit.of(concept(), edit=edit, theta=0.0)


def test_everything_that_would_be_ignored_is_named():
    with pytest.raises(ValueError, match="takes no unit and no target and no theta"):
        Edit.of(concept(), edit="ablate", unit="raw", target=1.0, theta=1.0)


@pytest.mark.parametrize("edit", ["clamp", "cap", "floor"])
def test_a_target_is_needed_and_finite(edit):
    with pytest.raises(ValueError, match=f"edit='{edit}' needs target=, the score to set"):
        edited(activations(), concept(), edit)
    with pytest.raises(ValueError, match="target=nan must be finite"):
        edited(activations(), concept(), edit, target=math.nan)


@pytest.mark.parametrize("edit", ["rotate", "angle"])
def test_a_plane_needs_an_angle_and_two_directions_that_differ(edit):
    one, two = concept(1), concept(2)
    with pytest.raises(ValueError, match=f"edit='{edit}' needs theta=, an angle in radians"):
        edited(activations(), [one, two], edit)
    with pytest.raises(ValueError, match="theta=inf must be finite"):
        edited(activations(), [one, two], edit, theta=math.inf)
    for wrong in (one, [one], [one, two, concept(3)]):
        with pytest.raises(ValueError, match=r"works in the plane of two vectors, got [13]: give \[first, second\]"):
            edited(activations(), wrong, edit, theta=1.0)
    for parallel in (one, -one, 2 * one, one + one):
        with pytest.raises(ValueError, match="the two vectors point the same way, so they span no plane"):
            edited(activations(), [one, parallel], edit, theta=1.0)


@pytest.mark.parametrize("edit", ["cap", "floor"])
def test_a_bound_is_on_one_vector(edit):
    with pytest.raises(ValueError, match="cap and floor bound one vector, got 2: attach one after another"):
        edited(activations(), [concept(1), concept(2)], edit, target=0.0)


@pytest.mark.parametrize("edit", ["ablate", "erase"])
def test_parallel_vectors_are_refused(edit):
    v = concept(oblique=False)
    for vectors in ([v, v], [v, -v], [v, v + v], [v, concept(2), 0.5 * v]):
        with pytest.raises(ValueError, match="point the same way: give directions that differ"):
            edited(activations(), vectors, edit)


@pytest.mark.parametrize("edit", KINDS)
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_block_without_a_distance_cannot_be_steered(edit, scale):
    v = concept(scale=torch.tensor([1.0, scale, 1.0]))
    with pytest.raises(ValueError, match=r"concept 0: held-out pairs show no distance between the poles at block 1"):
        Edit.of(v, edit=edit, blocks=1, **options_of(edit)).on(SHAPE)
    vectors = [v, concept(2)] if edit in ("rotate", "angle") else v
    Edit.of(vectors, edit=edit, blocks=2, **options_of(edit)).on(SHAPE)


def test_a_unit_that_the_vector_does_not_know():
    with pytest.raises(ValueError, match="unit='sigma': the vector does not know its sigma"):
        edited(activations(), concept() + concept(1), "add", unit="sigma")


def test_a_block_that_the_vector_does_not_hold():
    with pytest.raises(IndexError, match=r"the vector 'concept 0' has no block 3: it holds \[0, 1, 2\]"):
        Edit.of(concept(), blocks=3).on(Dimensions(D, BLOCKS + 1))


@pytest.mark.parametrize("wrong", [[], 3, None, [concept(), "honesty"], torch.zeros(D)], ids=repr)
def test_what_is_no_vector_is_refused(wrong):
    with pytest.raises(TypeError, match="expected a concept's name, a ConceptVector or several, or Coefficients; got"):
        Edit.of(wrong)


def test_vectors_of_different_sites_are_refused():
    with pytest.raises(ValueError, match="do not belong to one model and site: blocks is"):
        Edit.of([concept(), concept(1).at(0)], edit="ablate")


def constants() -> Coefficients:
    return loreft(torch.eye(D)[:2], torch.zeros(2, D), torch.zeros(2))


@pytest.mark.parametrize(
    ("edit", "unit", "options"),
    [("ablate", "kl", {}), ("add", "raw", {}), ("add", "kl", {"keep_norm": True}), ("add", "kl", {"target": 1.0})],
)
def test_bare_constants_take_nothing_that_they_would_ignore(edit, unit, options):
    with pytest.raises(ValueError, match="bare constants are the whole edit: leave out edit=, unit="):
        Edit.of(constants(), edit=edit, unit=unit, **options)


def test_bare_constants_do_not_know_their_block():
    of = Edit.of(constants(), blocks=0)
    assert constants_at(of, 0) is of.constants
    assert not of.has_length
    with pytest.raises(ValueError, match="pass blocks="):
        Edit.of(constants()).on(SHAPE)


@pytest.mark.parametrize(("weight", "bias"), [(torch.zeros(3, D), torch.zeros(2)), (torch.zeros(2, D), torch.zeros(3))])
def test_loreft_of_shapes_that_do_not_belong_together(weight, bias):
    with pytest.raises(ValueError, match=r"expected rotation and weight \(K, d_model\) and bias \(K,\)"):
        loreft(torch.eye(D)[:2], weight, bias)


def test_a_vector_of_another_shape_is_refused():
    of = Edit.of(concept())
    of.on(SHAPE)
    with pytest.raises(ValueError, match=r"the vector has d_model \[16\] and the model 32: extract it from this model"):
        of.on(Dimensions(2 * D, BLOCKS))
    with pytest.raises(ValueError, match="the vector holds block 2 and the model has 2"):
        of.on(Dimensions(D, 2))
    with pytest.raises(ValueError, match=r"has d_model \[16\] and the model 32"):
        Edit.of(constants(), blocks=0).on(Dimensions(2 * D, BLOCKS))
