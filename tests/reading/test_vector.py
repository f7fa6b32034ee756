"""The concept vector: laws of its arithmetic, its frozenness, and its files, broken ones included."""

import json
import math
import pickle
import struct
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import repe.models.files
import repe.reading.vector
from repe.reading.vector import ADDED, MAY_BE_UNKNOWN, PER_BLOCK, PER_DIRECTION, TENSORS, ConceptVector, has_digest

D, BLOCKS = 12, (2, 5, 7)
PROVENANCE = {
    "reader": "mean",
    "pairs": 40,
    "templates": ["a", "ä"],
    "fingerprint": {"key": "k", "sketch": {"w": [0.1]}},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

seeds = st.integers(0, 2**16)
factors = st.floats(-8, 8).filter(lambda f: abs(f) > 1e-3)


def concept(seed: int = 0, blocks=BLOCKS, d=D, **changes) -> ConceptVector:
    generator = torch.Generator().manual_seed(seed)
    write, other, center = torch.randn(3, len(blocks), d, generator=generator)
    write = write / write.norm(dim=-1, keepdim=True)
    read = write + 0.5 * (other - (other * write).sum(-1, keepdim=True) * write)
    per_block = dict(zip(PER_BLOCK, 0.5 + torch.rand(len(PER_BLOCK), len(blocks), generator=generator), strict=True))
    per_block["accuracy"] = per_block["accuracy"] / 1.5
    coherence = torch.corrcoef(torch.randn(len(blocks), 8, generator=generator)).reshape(len(blocks), -1)
    given = {"write": write, "read": read, "center": center, **per_block, "coherence": coherence.fill_diagonal_(1)}
    given |= {"provenance": PROVENANCE}
    return ConceptVector(**{"concept": f"c{seed}", "blocks": blocks, "recommended": blocks[1:2], **given, **changes})


def score(v: ConceptVector, x: Tensor) -> Tensor:
    return ((x * v.read).sum(-1) - v.midpoint) / v.scale


def displacements(v: ConceptVector) -> np.ndarray:
    return v.write.double().numpy() * v.scale.double().numpy()[:, None]


def assert_same(one: ConceptVector, other: ConceptVector) -> None:
    for f in fields(ConceptVector):
        mine, theirs = getattr(one, f.name), getattr(other, f.name)
        if isinstance(mine, Tensor):
            assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32)), f.name
        else:
            assert mine == theirs, f.name


def assert_normalised(v: ConceptVector) -> None:
    torch.testing.assert_close((v.read * v.write).sum(-1), torch.ones(len(v.blocks)))
    torch.testing.assert_close(v.write.norm(dim=-1), torch.ones(len(v.blocks)))


@given(seeds)
def test_the_poles_stand_at_minus_one_and_one_around_the_middle(seed):
    v = concept(seed)
    read, center = v.read.double().numpy(), v.center.double().numpy()
    np.testing.assert_allclose(v.midpoint, [r @ c for r, c in zip(read, center, strict=True)], atol=1e-5)
    for pole in (-1, 0, 1):
        torch.testing.assert_close(score(v, v.center + pole * v.displacement), torch.full((3,), float(pole)), **CLOSE)


# arithmetic


@given(seeds, seeds, seeds)
def test_addition_is_that_of_displacements(a, b, c):
    u, v, w = concept(a), concept(b), concept(c)
    np.testing.assert_allclose(displacements(u + v), displacements(u) + displacements(v), atol=1e-6)
    np.testing.assert_array_equal(displacements(u + v), displacements(v + u))
    np.testing.assert_allclose(displacements((u + v) + w), displacements(u + (v + w)), atol=2e-6)
    np.testing.assert_allclose(displacements(u - v), displacements(u) - displacements(v), atol=1e-6)


@given(seeds, factors, factors)
def test_multiplication_is_that_of_displacements(seed, f, g):
    v = concept(seed)
    np.testing.assert_allclose(displacements(f * v), f * displacements(v), rtol=1e-6)
    np.testing.assert_allclose(displacements(f * (g * v)), f * g * displacements(v), rtol=1e-6)
    np.testing.assert_allclose(displacements(f * v + g * v), (f + g) * displacements(v), atol=3e-6)
    assert_same(f * v, v * f)


def test_doubling_is_adding_to_itself():
    np.testing.assert_allclose(displacements(2 * concept()), displacements(concept() + concept()), rtol=1e-6)


@given(seeds)
def test_negation_is_undone_by_itself_and_turns_every_score(seed):
    v, x = concept(seed), torch.randn(len(BLOCKS), D, generator=torch.Generator().manual_seed(seed))
    negative = -v
    assert_same(-negative, v)
    torch.testing.assert_close(score(negative, x), -score(v, x))
    torch.testing.assert_close(negative.midpoint, -v.midpoint)
    assert torch.equal(negative.scale, v.scale)


@given(seeds, factors)
def test_a_multiple_keeps_the_midpoint_and_stretches_the_poles(seed, factor):
    v, x = concept(seed), torch.randn(len(BLOCKS), D, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(score(factor * v, x), score(v, x) / factor, **CLOSE)


@given(seeds, seeds, factors)
def test_reading_what_is_written_gives_one(a, b, factor):
    u, v = concept(a), concept(b)
    random = ConceptVector.random(u, seed=b)
    for w in (
        u,
        -u,
        factor * u,
        0 * u,
        u + v,
        u - v,
        u - u,
        u.orthogonal_to(v),
        u.orthogonal_to(u),
        random,
        u.spread(5),
    ):
        assert_normalised(w)


@given(seeds)
def test_nothing_is_left_of_a_difference_with_itself(seed):
    v = concept(seed)
    for nothing in (v - v, 0 * v, v.orthogonal_to(v), v.orthogonal_to(-3 * v, concept(seed + 1))):
        assert (nothing.scale == 0).all()
        assert (displacements(nothing) == 0).all()


def test_a_sum_takes_the_middle_and_forgets_what_was_measured():
    u, v = concept(1), concept(2, provenance={**PROVENANCE, "pairs": 3, "more": 1})
    for w in (u + v, v + u):
        torch.testing.assert_close(w.center, (u.center + v.center) / 2)
        torch.testing.assert_close(w.norm, (u.norm + v.norm) / 2)
        assert torch.equal(w.read, w.write)
        assert torch.stack([w.sigma, w.accuracy, w.separation]).isnan().all()
        assert w.provenance == {"made": "sum", "of": w.concept.split(" + "), "fingerprint": PROVENANCE["fingerprint"]}
    assert ((u + v).concept, (u - v).concept) == ("c1 + c2", "c1 - c2")
    assert (u + v).recommended == u.recommended


def test_what_is_made_of_vectors_says_of_which_and_keeps_whose_model_it_is():
    model = {"model": "m", "fingerprint": PROVENANCE["fingerprint"]}
    u, v = (concept(seed, provenance={**PROVENANCE, "model": "m"}) for seed in (1, 2))
    assert (u + v).provenance == {"made": "sum", "of": ["c1", "c2"], **model}
    assert (u - v).provenance == {"made": "difference", "of": ["c1", "c2"], **model}
    assert u.orthogonal_to(v).provenance == {"made": "orthogonal", "of": "c1", "to": ["c2"], **model}
    assert ConceptVector.random(u, 7).provenance == {"made": "random", "seed": 7, "like": "c1", **model}
    assert (u + concept(2, provenance={"model": "n"})).provenance == {"made": "sum", "of": ["c1", "c2"]}
    assert (-2 * u).provenance == u.provenance


def test_a_displacement_too_small_to_square_keeps_a_unit_direction():
    v = concept(scale=torch.full((3,), 1e-22))
    assert_normalised(v.orthogonal_to(concept(1)))


def test_what_cannot_be_steered_along_cannot_be_in_a_sum():
    v = concept(1, scale=torch.tensor([1.0, -0.5, 1.0]))
    for w in (v + concept(2), concept(2) - v, v + v, v.orthogonal_to(concept(2)), ConceptVector.random(v), -2 * v):
        assert (w.scale > 0).tolist() == [True, False, True]
    np.testing.assert_allclose(displacements(v + v), 2 * displacements(v), atol=1e-6)


@pytest.mark.parametrize("number", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)], ids=repr)
def test_numbers_of_every_kind_multiply(number):
    assert_same(concept() * number, concept() * float(number))


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_factor_is_finite(factor):
    with pytest.raises(ValueError, match="can be multiplied by a finite number, got"):
        concept() * factor


@pytest.mark.parametrize(
    "operation", [lambda v: v + 1, lambda v: 1 + v, lambda v: v - 1, lambda v: v * v, lambda v: "a" * v]
)
def test_what_has_no_meaning_is_a_type_error(operation):
    with pytest.raises(TypeError):
        operation(concept())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (2, 5, 8)}, r"blocks is \(2, 5, 7\) and \(2, 5, 8\)"),
        ({"d": 4}, "d_model is 12 and 4"),
        ({"site": "mlp"}, "site is block and mlp"),
        ({"stack": "encoder"}, "stack is decoder and encoder"),
    ],
)
def test_vectors_of_different_places_do_not_mix(changes, message):
    one, other = concept(1), concept(2, **changes)
    for mix in (one.__add__, one.__sub__, one.cosine, one.orthogonal_to, one.check_alike):
        with pytest.raises(ValueError, match=f"'c1' and '-?c2' do not belong to one model and site: {message}"):
            mix(other)


# geometry


@given(seeds, st.integers(1, 3))
def test_what_is_left_is_orthogonal_to_each_and_spanned_with_them(seed, n):
    v, others = concept(seed), [concept(seed + i) for i in range(1, n + 1)]
    left = v.orthogonal_to(*others)
    for other in others:
        assert left.cosine(other).abs().max() < 1e-6
    for row in range(len(BLOCKS)):
        span = np.stack([o.write[row].double().numpy() for o in others])
        taken = displacements(v)[row] - displacements(left)[row]
        weights = np.linalg.lstsq(span.T, taken, rcond=None)[0]
        np.testing.assert_allclose(weights @ span, taken, atol=1e-6)


@pytest.mark.parametrize("again", [lambda o: o, lambda o: -2 * o, lambda o: o + o])
def test_naming_a_direction_twice_takes_no_more_away(again):
    v, other = concept(1), concept(2)
    np.testing.assert_allclose(
        displacements(v.orthogonal_to(other, again(other))), displacements(v.orthogonal_to(other)), atol=1e-5
    )


def test_orthogonal_to_nothing_is_a_question():
    with pytest.raises(ValueError, match="orthogonal to what"):
        concept().orthogonal_to()


def test_cosine_is_that_of_the_write_directions():
    u, v = concept(1), concept(2)
    expected = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in zip(u.write.numpy(), v.write.numpy(), strict=True)
    ]
    np.testing.assert_allclose(u.cosine(v), expected, atol=1e-6)
    np.testing.assert_allclose(u.cosine(-3 * u), -1, atol=1e-6)


def test_random_directions_are_seeded_and_as_long():
    v = concept()
    assert_same(ConceptVector.random(v, 3), ConceptVector.random(v, 3))
    drawn = ConceptVector.random(v, 3)
    torch.testing.assert_close(drawn.scale, v.scale)
    assert torch.equal(drawn.norm, v.norm)
    assert drawn.cosine(ConceptVector.random(v, 4)).abs().max() < 0.99
    before = torch.get_rng_state()
    ConceptVector.random(v)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_directions_are_spread_evenly():
    like = concept(blocks=tuple(range(4000)), d=3)
    drawn = ConceptVector.random(like, seed=1).write.double()
    assert drawn.mean(0).abs().max() < 4 / math.sqrt(3 * 4000)
    torch.testing.assert_close(drawn.T @ drawn / 4000, torch.eye(3, dtype=torch.float64) / 3, atol=0.03, rtol=0)
    # on a sphere in three dimensions every coordinate is uniform (Archimedes); on a cube's projection it is not
    counts = torch.histc(drawn[:, 0], bins=8, min=-1, max=1)
    assert ((counts - 500).abs() < 5 * math.sqrt(500)).all()


# rows


def test_at_takes_rows_in_the_order_named():
    v = concept()
    taken = v.at(7, 2)
    assert taken.blocks == taken.recommended == (7, 2)
    for name in PER_DIRECTION + PER_BLOCK:
        assert torch.equal(getattr(taken, name), getattr(v, name)[[2, 0]])
    assert torch.equal(taken.coherence, v.coherence[[2, 0]][:, [2, 0]])
    with pytest.raises(IndexError, match=r"the vector 'c0' has no block 3: it holds \[2, 5, 7\]"):
        v.at(2, 3)
    with pytest.raises(ValueError, match=r"`blocks` holds at least one block number, none twice"):
        v.at()


def test_spread_has_one_direction_everywhere_and_each_blocks_own_norm():
    v = concept()
    everywhere = v.spread(5)
    assert everywhere.blocks == v.blocks
    for name in PER_DIRECTION + PER_BLOCK:
        expected = v.norm if name == "norm" else getattr(v, name)[[1, 1, 1]]
        assert torch.equal(getattr(everywhere, name), expected)
    assert everywhere.coherence.isnan().all()
    with pytest.raises(IndexError, match="has no block 4"):
        v.spread(4)


# the values


def test_it_is_frozen():
    v = concept()
    for f in fields(ConceptVector):
        with pytest.raises(FrozenInstanceError):
            setattr(v, f.name, getattr(v, f.name))


def test_operations_leave_the_operands_as_they_were():
    v, w = concept(1), concept(2)
    _ = -v, 2 * v, v + w, v - w, v.orthogonal_to(w), v.at(5), v.spread(2), ConceptVector.random(v)
    assert_same(v, concept(1))
    assert_same(w, concept(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"write": torch.zeros(D)}, r"`write` has shape \(12,\), expected \(blocks, d_model\)"),
        ({"write": torch.tensor(0.0)}, r"`write` has shape \(\), expected"),
        ({"read": torch.zeros(3, D + 1)}, r"`read` has shape \(3, 13\), expected \(3, 12\)"),
        ({"scale": torch.zeros(3, 1)}, r"`scale` has shape \(3, 1\), expected \(3,\)"),
        ({"write": torch.zeros(3, D).double()}, r"`write` is torch.float64, expected torch.float32"),
        ({"norm": torch.zeros(3).half()}, r"`norm` is torch.float16, expected torch.float32"),
        ({"read": torch.full((3, D), math.nan)}, "`read` holds values that are not finite"),
        ({"scale": torch.full((3,), math.nan)}, "`scale` holds values that are not finite"),
        ({"sigma": torch.full((3,), math.inf)}, "`sigma` holds values that are not finite"),
        ({"write": 5 * torch.eye(3, D)}, r"`write` has unit norm at every block, got norms \[5.0, 5.0, 5.0\]"),
        ({"write": torch.zeros(3, D)}, "`write` has unit norm at every block"),
        (
            {"write": torch.eye(3, D), "read": 7 * torch.eye(3, D)},
            r"`read . write` is 1 at every block, got \[7.0, 7.0, 7.0\]: divide `read` by it",
        ),
        ({"write": torch.eye(3, D), "read": -torch.eye(3, D)}, r"`read . write` is 1 at every block, got \[-1.0"),
        ({"scale": torch.ones(3, device="meta")}, "`scale` is on meta, expected the CPU"),
        ({"recommended": (3,)}, r"recommended blocks \[3\] are not among the vector's blocks \(2, 5, 7\)"),
        ({"recommended": ()}, "`recommended` holds at least one block number"),
        (
            {"blocks": (2, 2, 5)},
            r"`blocks` holds at least one block number, none twice, counted from 0; got \[2, 2, 5\]",
        ),
        ({"blocks": (2, 5, -1)}, r"counted from 0; got \[2, 5, -1\]"),
        ({"blocks": (2, 5, True)}, r"counted from 0; got \[2, 5, True\]"),
    ],
)
def test_values_that_make_no_vector_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(concept(), **changes)


def test_lists_of_blocks_become_tuples():
    v = replace(concept(), blocks=[2, 5, 7], recommended=[5])
    assert (v.blocks, v.recommended) == ((2, 5, 7), (5,))


def test_repr_says_what_it_is_and_where_it_is_best():
    v = concept(accuracy=torch.tensor([0.5, 0.875, 1.0]), scale=torch.tensor([1.0, 2.5, 1.0]), site="mlp")
    assert repr(v) == "ConceptVector('c0', 3 blocks x 12, site mlp; best at block 5 (accuracy 0.88, scale 2.5))"


# files


@pytest.mark.parametrize(
    "make",
    [
        concept,
        lambda: concept(1) + concept(2),
        lambda: concept(1) - concept(1),
        lambda: ConceptVector.random(concept()),
        lambda: concept().spread(5),
        lambda: concept().at(7, 2),
        lambda: concept(write=concept().write.mT.contiguous().mT, separation=torch.tensor([1.0, math.nan, math.inf])),
        lambda: concept(site="mlp", stack="encoder", provenance={}),
    ],
)
def test_a_file_holds_every_bit(make, tmp_path):
    path = tmp_path / "new" / "folder" / "v.safetensors"
    assert make().save(str(path)) == path
    assert_same(ConceptVector.load(path), make())
    assert_same(ConceptVector.load(str(path)), make())
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]


def test_a_missing_file_says_so(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no vector file at"):
            ConceptVector.load(path)


def refused(path, content: bytes, message: str = "") -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole concept vector: ") as raised:
        ConceptVector.load(path)
    assert str(path) in str(raised.value)
    assert str(raised.value).endswith("A new one is what `repe.extract` returns: save it at another path")
    assert path.exists()
    assert message in str(raised.value)


def saved(tmp_path) -> tuple[bytes, int]:
    """A whole file, and the length of its header."""
    content = concept().save(tmp_path / "whole.safetensors").read_bytes()
    return content, 8 + struct.unpack("<Q", content[:8])[0]


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    content, header = saved(tmp_path)
    ends = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1}
    for end in sorted(ends | set(range(0, len(content), 97))):
        refused(tmp_path / "cut.safetensors", content[:end])
    refused(tmp_path / "long.safetensors", content + b"\0")


def test_a_header_that_is_broken_anywhere_is_refused_or_harmless(tmp_path):
    content, header = saved(tmp_path)
    path = tmp_path / "flipped.safetensors"
    for place in range(0, header, 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        try:
            ConceptVector.load(path)
        except ValueError as error:
            assert "is not a whole concept vector" in str(error)  # noqa: PT017


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**6, 0])
def test_a_header_of_a_false_length_is_refused(length, tmp_path):
    content, _ = saved(tmp_path)
    refused(tmp_path / "huge.safetensors", struct.pack("<Q", length) + content[8:])


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_other_kinds_of_files_are_refused(tmp_path):
    bomb = tmp_path / "bomb.pt"
    torch.save(Bomb(), bomb)
    for content in (pickle.dumps(Bomb()), bomb.read_bytes(), b"{}", b"GGUF" * 100, "é".encode() * 100):
        refused(tmp_path / "other.safetensors", content)


def header_of(tmp_path) -> dict:
    return {
        "concept": "c", "site": "block", "stack": "decoder", "blocks": [2, 5, 7], "recommended": [5],
        "provenance": {}, "format": "repe.vector/1",
    }  # fmt: skip


def tensors_of() -> dict[str, Tensor]:
    return {name: getattr(concept(), name) for name in TENSORS}


def test_the_parts_that_hostile_files_are_made_of_are_themselves_good(tmp_path):
    path = tmp_path / "v.safetensors"
    save_file(tensors_of(), path, metadata={"repe": json.dumps(header_of(tmp_path))})
    assert ConceptVector.load(path).blocks == BLOCKS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept": 3}, "missing or mistyped fields: ['concept']"),
        ({"concept": None}, "['concept']"),
        ({"blocks": "257"}, "['blocks']"),
        ({"blocks": {"2": 1}}, "['blocks']"),
        ({"provenance": []}, "['provenance']"),
        ({"format": "repe.vector/2"}, "its format is 'repe.vector/2', and this version of the library reads 'repe.vec"),
        ({"format": ["repe.vector/1"]}, "its format is ['repe.vector/1']"),
        ({"blocks": [2, 5, -7]}, "counted from 0; got [2, 5, -7]"),
        ({"blocks": [2, 5, 5]}, "none twice"),
        ({"blocks": [2, 5, 7.0]}, "counted from 0"),
        ({"blocks": [2, 5, None]}, "counted from 0"),
        ({"blocks": [2, 5, [7]]}, "counted from 0"),
        ({"blocks": [2, 5]}, "has shape (3, 12), expected (2, 12)"),
        ({"blocks": []}, "at least one"),
        ({"recommended": [6]}, "recommended blocks [6] are not among"),
        ({"recommended": []}, "at least one"),
        ({"recommended": ["5"]}, "counted from 0"),
    ],
)
def test_a_header_that_says_nonsense_is_refused(changes, message, tmp_path):
    header = json.dumps({**header_of(tmp_path), **changes})
    refused(tmp_path / "v.safetensors", save(tensors_of(), metadata={"repe": header}), message)


@pytest.mark.parametrize("field", ["concept", "site", "stack", "blocks", "recommended", "provenance", "format"])
def test_a_header_that_lacks_a_field_is_refused(field, tmp_path):
    header = header_of(tmp_path)
    del header[field]
    refused(tmp_path / "v.safetensors", save(tensors_of(), metadata={"repe": json.dumps(header)}))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", ""), ("{", ""), ("[]", "format"), ("3", "format"), ("null", "format"), ("[" * 100_000, ""), ("1" * 5000, "")],
    ids=["empty", "open", "list", "number", "null", "deep", "long"],
)
def test_a_header_that_is_no_json_object_is_refused(text, message, tmp_path):
    refused(tmp_path / "v.safetensors", save(tensors_of(), metadata={"repe": text}), message)


@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_no_bit_of_the_numbers_can_turn_unseen(tmp_path_factory, place, bit):
    path = tmp_path_factory.getbasetemp() / "turned.safetensors"
    concept().save(path)
    written = bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", written[:8])[0]
    written[begin + place % (len(written) - begin)] ^= 1 << bit
    path.write_bytes(written)
    with pytest.raises(ValueError, match="is not a whole concept vector: its digest is that of other numbers"):
        ConceptVector.load(path)


def test_a_file_without_a_digest_is_read_and_known_as_such(tmp_path):
    path, whole = tmp_path / "v.safetensors", concept()
    whole.save(path)
    assert has_digest(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()["repe"]
    save_file(load_file(path), path, metadata={"repe": header})
    assert not has_digest(path)
    assert ConceptVector.load(path).digest == whole.digest


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("norm", -1.0, "`norm` holds negative lengths"), ("sigma", -1.0, "`sigma` holds negative lengths"),
     ("accuracy", 5.0, "`accuracy` holds numbers that are no shares"), ("accuracy", -0.1, "no shares"),
     ("site", "blocks", r"site='blocks' does not exist: choose one of \['block'"), ("stack", "", "stack='' does not")],
)  # fmt: skip
def test_what_no_vector_can_have_is_refused(name, value, told):
    with pytest.raises(ValueError, match=told):
        concept(**{name: value if isinstance(value, str) else torch.full((len(BLOCKS),), value)})


def test_a_file_without_our_header_is_refused(tmp_path):
    refused(tmp_path / "v.safetensors", save(tensors_of()), "it has no `repe` header")
    refused(tmp_path / "v.safetensors", save(tensors_of(), metadata={"format": "pt"}), "it has no `repe` header")


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_missing_or_wrong_is_refused(name, tmp_path):
    good, header = tensors_of(), json.dumps(header_of(tmp_path))
    wrong = [
        *([{k: v for k, v in good.items() if k != name}] if name not in ADDED else []),
        *(
            {**good, name: good[name].to(dtype)}
            for dtype in (torch.float64, torch.float16, torch.int64, torch.complex64)
        ),
        *(
            {**good, name: shaped}
            for shaped in (good[name][:2].clone(), good[name][..., None].clone(), torch.zeros(()))
        ),
        {**good, name: torch.full_like(good[name], -math.inf)},
    ]
    if name not in MAY_BE_UNKNOWN:
        wrong += [{**good, name: torch.full_like(good[name], math.nan)}]
    for tensors in wrong:
        refused(tmp_path / "v.safetensors", save(tensors, metadata={"repe": header}), name)


def test_a_file_is_read_to_which_a_later_version_added_what_a_reader_may_do_without(tmp_path):
    path = tmp_path / "v.safetensors"
    header = json.dumps({**header_of(tmp_path), "licence": "MIT"})
    save_file({**tensors_of(), "curvature": torch.ones(3)}, path, metadata={"repe": header})
    assert_same(ConceptVector.load(path), concept(concept="c", provenance={}))


def test_a_file_of_an_earlier_version_is_read_and_what_it_lacks_is_unknown(tmp_path):
    path, header = tmp_path / "v.safetensors", json.dumps(header_of(tmp_path))
    save_file({k: v for k, v in tensors_of().items() if k not in ADDED}, path, metadata={"repe": header})
    for found in (ConceptVector.load(path), ConceptVector.from_json(older(ConceptVector.load(path).to_json()))):
        assert all(getattr(found, name).isnan().all() for name in ADDED)
        assert_same(
            replace(found, **{name: getattr(concept(), name) for name in ADDED}), concept(concept="c", provenance={})
        )


def older(data):
    return {k: v for k, v in data.items() if k not in ADDED}


def test_a_dose_is_a_length():
    with pytest.raises(ValueError, match="`dose` holds negative lengths"):
        concept(dose=-torch.ones(3))


@pytest.mark.parametrize(
    "wrong",
    [[[1.0, 0.5], [0.2, 1.0]], [[0.9, 0.5], [0.5, 0.9]], [[1.0, 2.0], [2.0, 1.0]]],
    ids=["one way", "self", "big"],
)
def test_a_coherence_is_a_correlation(wrong):
    with pytest.raises(ValueError, match="`coherence` is no correlation"):
        concept(blocks=(2, 5), coherence=torch.tensor(wrong))


def test_pushes_add_up_where_their_coherence_is_not_known_and_less_where_it_is():
    """By hand: of two unit pushes of correlation r, half of each is as long as the root of (1 + r) / 2."""
    doses, even = torch.tensor([0.5, 0.5]), {"scale": torch.ones(3), "dose": torch.full((3,), 4.0)}
    unknown, known = concept(coherence=None, **even), concept(**even)
    assert unknown.cost_of((2, 7), doses) == 1.0
    assert unknown.lengths_at((2, 7)).tolist() == [2.0, 2.0]
    r = float(known.coherence[0, 2])
    assert known.cost_of((2, 7), doses) == pytest.approx(math.sqrt((1 + r) / 2))
    assert known.lengths_at((2, 7)).tolist() == pytest.approx([2 / math.sqrt((1 + r) / 2)] * 2)
    partly = known.coherence.clone()
    partly[0, 1] = partly[1, 0] = math.nan
    assert concept(coherence=partly).cost_of((2, 7), doses) == known.cost_of((2, 7), doses)
    assert concept(coherence=partly).cost_of((2, 5), doses) == 1.0


@given(seeds)
def test_the_lengths_at_several_blocks_are_one_part_of_the_way_and_cost_one_dose(seed):
    v = concept(seed)
    for blocks in ((2,), (2, 7), (7, 5, 2)):
        rows, lengths = [v.row(block) for block in blocks], v.lengths_at(blocks)
        parts = lengths / v.scale[rows]
        torch.testing.assert_close(parts, parts[:1].expand_as(parts))
        doses = lengths / v.dose[rows]
        assert float(doses.max()) <= 1 + 1e-5
        assert v.cost_of(blocks, doses) == pytest.approx(1, rel=1e-4) or float(doses.max()) == pytest.approx(1)
    assert v.lengths_at((5,)).tolist() == pytest.approx([float(v.dose[1])])


def test_what_cancels_out_is_pushed_by_a_dose_at_most():
    opposed = concept(blocks=(2, 7), coherence=torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert (opposed.lengths_at((2, 7)) / opposed.dose).max() == pytest.approx(1)


def test_a_failure_while_writing_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = concept(1).save(tmp_path / "v.safetensors")

    def full_disk(*_):
        raise OSError("no space left on device")

    def half(draft, content):
        with draft.open("wb") as file:
            file.write(content[: len(content) // 2])
        full_disk()

    for target, name, failure in (
        (repe.models.files.os, "replace", full_disk),
        (repe.reading.vector.Path, "write_bytes", half),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(target, name, failure)
            with pytest.raises(OSError, match="no space left"):
                concept(2).save(path)
        assert_same(ConceptVector.load(path), concept(1))
        assert list(tmp_path.iterdir()) == [path]
    concept(2).save(path)
    assert_same(ConceptVector.load(path), concept(2))


def test_two_threads_that_save_one_file_do_not_mix(tmp_path, monkeypatch):
    path, write = tmp_path / "v.safetensors", repe.reading.vector.Path.write_bytes

    def interrupted(draft, content):
        monkeypatch.undo()
        concept(2).save(path)
        assert_same(ConceptVector.load(path), concept(2))
        return write(draft, content)

    monkeypatch.setattr(repe.reading.vector.Path, "write_bytes", interrupted)
    concept(1).save(path)
    assert_same(ConceptVector.load(path), concept(1))
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_can_be_read_by_whom_the_umask_says(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    saved_mode = concept().save(tmp_path / "v.safetensors").stat().st_mode
    assert saved_mode == (tmp_path / "plain").stat().st_mode


def test_provenance_that_is_no_json_leaves_the_old_file(tmp_path):
    path = concept(1).save(tmp_path / "v.safetensors")
    with pytest.raises(TypeError, match="not JSON serializable"):
        concept(2, provenance={"model": object()}).save(path)
    assert_same(ConceptVector.load(path), concept(1))
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_a_plain_safetensors_file(tmp_path):
    stored = load_file(concept().save(tmp_path / "v.safetensors"))
    assert set(stored) == {*TENSORS}
    assert {t.dtype for t in stored.values()} == {torch.float32}
