"""The artefact: exact round trips, and a refusal for every way of being wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steering.errors import VectorError
from steering.vectors import LAYER_CONVENTION, Manifest, ShiftVectors
from tests.steering.samples import identity, manifest, shift_vectors

TENSORS = (
    "mean",
    "hidden_norm",
    "consistency",
    "basis",
    "singular_values",
    "refusal_direction",
    "text_mean",
)


def rewritten(
    data: bytes, header: dict[str, Any] | None = None, **tensors: torch.Tensor | None
) -> bytes:
    """The file with parts of its header or tensors replaced (None: left out)."""
    length = int.from_bytes(data[:8], "little")
    old = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["deshift"])
    kept = safetensors.torch.load(data) | tensors
    return safetensors.torch.save(
        {name: tensor for name, tensor in kept.items() if tensor is not None},
        {"deshift": json.dumps(old | (header or {}))},
    )


def test_a_file_comes_back_with_every_tensor_and_the_manifest(tmp_path: Path) -> None:
    vectors = shift_vectors()
    vectors.save(tmp_path / "set.safetensors")
    loaded = ShiftVectors.load(tmp_path / "set.safetensors", expected_id=vectors.id)
    assert loaded.manifest == vectors.manifest
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(vectors, name))
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]


def test_the_optional_tensors_may_be_left_out() -> None:
    names = ("basis", "singular_values", "refusal_direction", "text_mean")
    vectors = shift_vectors(**dict.fromkeys(names))
    loaded = ShiftVectors.from_bytes(vectors.to_bytes())
    assert [getattr(loaded, name) for name in names] == [None] * 4


def test_prompts_are_measured_against_text_and_the_mean_shift_where_the_set_knows_both() -> None:
    vectors = shift_vectors()
    assert vectors.reference is not None and vectors.text_mean is not None
    assert torch.equal(vectors.reference.text, vectors.text_mean)
    assert torch.equal(vectors.reference.delta, vectors.mean)
    assert shift_vectors(text_mean=None).reference is None


def test_the_id_is_the_digest_of_the_bytes_and_equal_content_has_equal_bytes() -> None:
    data = shift_vectors().to_bytes()
    assert shift_vectors().to_bytes() == data
    assert shift_vectors().id == hashlib.sha256(data).hexdigest()
    assert ShiftVectors.from_bytes(data).id == shift_vectors().id
    assert ShiftVectors.from_bytes(data).to_bytes() == data
    assert shift_vectors(seed=1).id != shift_vectors().id


def test_the_file_is_plain_safetensors_with_the_manifest_in_its_header(tmp_path: Path) -> None:
    vectors = shift_vectors()
    vectors.save(tmp_path / "set.safetensors")
    with safetensors.safe_open(str(tmp_path / "set.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["deshift"])
        assert torch.equal(file.get_tensor("mean"), vectors.mean)
    assert header["manifest"]["model"]["model_id"] == "tiny"
    assert header["manifest"]["layer_convention"] == LAYER_CONVENTION


def test_a_non_contiguous_tensor_is_stored_as_it_reads() -> None:
    mean = torch.arange(24.0).reshape(8, 3).T
    assert torch.equal(
        ShiftVectors.from_bytes(shift_vectors(mean=mean).to_bytes()).mean,
        torch.arange(24.0).reshape(8, 3).T,
    )


@pytest.mark.parametrize("knows_id", [True, False])
def test_a_flipped_byte_is_refused_wherever_it_is(knows_id: bool) -> None:
    vectors = shift_vectors()
    data = vectors.to_bytes()
    step = 100 if knows_id else 7
    for position in range(0, len(data), step):
        damaged = bytearray(data)
        damaged[position] ^= 0x01
        with pytest.raises(VectorError):
            ShiftVectors.from_bytes(bytes(damaged), vectors.id if knows_id else None)


def test_a_truncated_file_is_refused_at_every_length() -> None:
    data = shift_vectors().to_bytes()
    for length in range(0, len(data), 50):
        with pytest.raises(VectorError):
            ShiftVectors.from_bytes(data[:length])


def test_an_intact_file_of_another_id_is_refused_with_both_ids() -> None:
    one, other = shift_vectors(0), shift_vectors(1)
    with pytest.raises(VectorError, match=f"{one.id[:12]}.*{other.id[:12]}"):
        ShiftVectors.from_bytes(other.to_bytes(), expected_id=one.id)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(VectorError, match="safetensors"):
        ShiftVectors.from_bytes(data)


def test_a_checkpoint_is_not_taken_for_shift_vectors() -> None:
    with pytest.raises(VectorError, match="not of shift vectors"):
        ShiftVectors.from_bytes(safetensors.torch.save({"weight": torch.ones(2)}))


@pytest.mark.parametrize("name", ["corruption", "model", "versions", "layer_convention"])
def test_a_missing_manifest_field_is_named(name: str) -> None:
    values = manifest().as_dict()
    del values[name]
    with pytest.raises(VectorError, match=f"lacks the field {name}"):
        ShiftVectors.from_bytes(rewritten(shift_vectors().to_bytes(), {"manifest": values}))


@pytest.mark.parametrize("value", [1, None, [], "x"])
def test_a_manifest_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(VectorError, match="manifest is not an object"):
        Manifest.from_dict(value)


def test_mistyped_and_unknown_manifest_fields_are_refused() -> None:
    values = manifest().as_dict()
    with pytest.raises(VectorError, match=r"manifest\.num_anchors is '4'"):
        Manifest.from_dict(values | {"num_anchors": "4"})
    with pytest.raises(VectorError, match="unknown field colour"):
        Manifest.from_dict(values | {"colour": "red"})
    with pytest.raises(VectorError, match=r"manifest\.model\.num_layers is True"):
        Manifest.from_dict(values | {"model": values["model"] | {"num_layers": True}})
    with pytest.raises(VectorError, match="versions"):
        Manifest.from_dict(values | {"versions": ["torch"]})


def test_another_format_is_refused_by_name() -> None:
    data = rewritten(shift_vectors().to_bytes(), {"format": "deshift shift vectors 2"})
    with pytest.raises(VectorError, match="shift vectors 2'; this version reads"):
        ShiftVectors.from_bytes(data)


def test_a_replaced_tensor_is_noticed_without_knowing_the_id() -> None:
    data = rewritten(shift_vectors().to_bytes(), mean=torch.zeros(3, 8))
    with pytest.raises(VectorError, match="digest in its header"):
        ShiftVectors.from_bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", TENSORS)
def test_nan_and_infinity_are_refused_with_tensor_and_layer(name: str, value: float) -> None:
    tensor = getattr(shift_vectors(), name).clone()
    tensor[1] = value
    with pytest.raises(VectorError, match=f"{name} holds NaN or infinity, first in layer 1"):
        shift_vectors(**{name: tensor})


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_dtypes_and_shapes_are_refused_with_the_tensors_name(name: str) -> None:
    tensor = getattr(shift_vectors(), name)
    with pytest.raises(VectorError, match=f"{name} is torch.float16"):
        shift_vectors(**{name: tensor.half()})
    with pytest.raises(VectorError, match=f"{name} has the shape"):
        shift_vectors(**{name: tensor[:2]})
    with pytest.raises(VectorError, match="has the shape"):
        shift_vectors(**{name: tensor[..., None]})


def test_a_basis_without_singular_values_is_refused() -> None:
    with pytest.raises(VectorError, match="together"):
        shift_vectors(singular_values=None)


def test_a_hidden_norm_of_zero_is_refused() -> None:
    with pytest.raises(VectorError, match="hidden_norm of layer 2"):
        shift_vectors(hidden_norm=torch.tensor([1.0, 1.0, 0.0]))


def test_vectors_fit_their_own_model_renamed_or_in_another_float_format() -> None:
    vectors = shift_vectors()
    vectors.check(identity())
    vectors.check(identity(model_id="copy", revision="main"))
    vectors.check(identity(dtype="bfloat16"))
    vectors.check(identity(dtype="float16"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weights_digest", "e" * 64, "weights: made for aaaaaaaaaaaa, here eeeeeeeeeeee"),
        ("processor_digest", "e" * 64, "processor: made for bbbbbbbbbbbb, here eeeeeeeeeeee"),
        ("chat_template_digest", "e" * 64, "chat template: made for cccccccccccc, here eeeeeeeeee"),
        ("num_layers", 4, "layers: made for 3, here 4"),
        ("hidden_size", 16, "hidden size: made for 8, here 16"),
        ("quantisation", "awq", "quantisation: made for None, here awq"),
        ("dtype", "float64", "dtype: made for float32, here float64"),
    ],
)
def test_vectors_of_another_model_are_refused_with_exactly_what_differs(
    name: str, value: Any, said: str
) -> None:
    with pytest.raises(VectorError) as refused:
        shift_vectors().check(identity(**{name: value}))
    assert said in str(refused.value)
    assert str(refused.value).count("made for") == 2  # the set's own model, and the difference


def test_every_difference_is_said_at_once() -> None:
    with pytest.raises(VectorError, match=r"layers: .*; hidden size: "):
        shift_vectors().check(identity(num_layers=4, hidden_size=16))


def test_another_layer_convention_is_refused() -> None:
    vectors = shift_vectors(manifest=manifest(layer_convention="before layer l"))
    with pytest.raises(VectorError, match="before layer l"):
        vectors.check(identity())


def test_load_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="absent"):
        ShiftVectors.load(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(VectorError, match="text: not a safetensors file"):
        ShiftVectors.load(tmp_path / "text")
