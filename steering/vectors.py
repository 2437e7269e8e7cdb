"""The artefact: a shift vector set with its provenance, and every reason to refuse one.

Covers the file format and its checks. Does not compute shifts (extract.py) nor keep them
(stores/).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from steering.errors import VectorError
from steering.models import ModelIdentity
from steering.projection import Reference

LAYER_CONVENTION = "residual stream after decoder layer l, 0-based, before any final norm"
_FORMAT = "deshift shift vectors 1"
_INTERCHANGEABLE_DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class Manifest:
    """Where a vector set comes from.

    `image_size` is the corrupted image's, WIDTHxHEIGHT; `versions` are (library, version) pairs;
    `created_at` is UTC in ISO 8601.
    """

    model: ModelIdentity
    corruption: str
    image_size: str
    anchor_set: str
    anchor_set_digest: str
    num_anchors: int
    versions: tuple[tuple[str, str], ...]
    created_at: str
    layer_convention: str = LAYER_CONVENTION

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: `model` nested, `versions` an object."""
        return asdict(self) | {"versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, values: Any) -> "Manifest":
        """The inverse of `as_dict`. Raises VectorError for a missing, unknown or mistyped field."""
        values = _checked(values, cls, "manifest")
        model = ModelIdentity(**_checked(values["model"], ModelIdentity, "manifest.model"))
        if not isinstance(values["versions"], dict):
            raise VectorError("manifest: `versions` must be an object")
        versions = tuple(sorted((str(k), str(v)) for k, v in values["versions"].items()))
        return cls(**values | {"model": model, "versions": versions})


@dataclass(frozen=True, eq=False)
class ShiftVectors:
    """The shift of every decoder layer, and what is known about it.

    Sign, once for the whole project: Delta_l = h_l(prompt with corrupted image) - h_l(prompt
    without image), at the last prompt token, and steering *subtracts* alpha * w_l * Delta_l.
    Values are in the units of the model's own hidden states; l counts decoder layers from 0 and
    h_l is the residual stream after layer l.

    mean (L, D): Delta_l averaged over the anchors. hidden_norm (L,): the median |h_l| of the
    prompts with the corrupted image. consistency (L,): the mean pairwise cosine of the prompts'
    shifts. basis (L, k, D), singular_values (L, k): the leading right singular vectors of the
    uncentred shifts. refusal_direction (L, D): mean h_l of harmful minus of harmless text.
    text_mean (L, D): mean h_l of the anchors' text-only prompts; a set of before it has none.
    All float32, on the CPU, finite; treat them as constants. Raises VectorError otherwise.
    """

    manifest: Manifest
    mean: Tensor
    hidden_norm: Tensor
    consistency: Tensor
    basis: Tensor | None = None
    singular_values: Tensor | None = None
    refusal_direction: Tensor | None = None
    text_mean: Tensor | None = None

    def __post_init__(self) -> None:
        num_layers, hidden_size = self.num_layers, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (num_layers, hidden_size),
            "hidden_norm": (num_layers,),
            "consistency": (num_layers,),
            "refusal_direction": (num_layers, hidden_size),
            "text_mean": (num_layers, hidden_size),
        }
        if (self.basis is None) != (self.singular_values is None):
            raise VectorError("basis and singular_values come together or not at all")
        if self.basis is not None:
            rank = self.basis.shape[1] if self.basis.dim() == 3 else 0
            shapes |= {"basis": (num_layers, rank, hidden_size)}
            shapes |= {"singular_values": (num_layers, rank)}
        for name, tensor in self._tensors().items():
            _check_tensor(name, tensor, shapes[name])
        if not bool((self.hidden_norm > 0).all()):
            layer = int((self.hidden_norm <= 0).nonzero()[0])
            raise VectorError(f"hidden_norm of layer {layer} is not above zero")

    @property
    def num_layers(self) -> int:
        return self.manifest.model.num_layers

    @property
    def hidden_size(self) -> int:
        return self.manifest.model.hidden_size

    @property
    def reference(self) -> Reference | None:
        """What prompts are measured against; None without a `text_mean`."""
        return None if self.text_mean is None else Reference(self.text_mean, self.mean)

    @cached_property
    def id(self) -> str:
        """sha256 of the file's bytes, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def check(self, identity: ModelIdentity) -> None:
        """Raise VectorError unless the set was made for this model, template and processor.

        Names and revisions do not decide, digests do: a renamed copy of the model is the same
        model. float32, bfloat16 and float16 runs of the same weights share a vector set, since
        a mean over the anchors differs less between them than one prompt's shift does; a
        quantised checkpoint has other weights and so another digest. The corruption kind is the
        vector set's own affair.
        """
        made, here = self.manifest.model, identity
        differences = [
            f"{label}: made for {_short(getattr(made, name))}, here {_short(getattr(here, name))}"
            for name, label in _DECISIVE.items()
            if getattr(made, name) != getattr(here, name)
        ]
        if made.dtype != here.dtype and not {made.dtype, here.dtype} <= _INTERCHANGEABLE_DTYPES:
            differences.append(f"dtype: made for {made.dtype}, here {here.dtype}")
        if self.manifest.layer_convention != LAYER_CONVENTION:
            differences.append(f"layers mean {self.manifest.layer_convention!r}")
        if differences:
            raise VectorError(
                f"vector set {self.id[:12]}, made for {_name(made)}, does not fit "
                f"{_name(here)}: {'; '.join(differences)}. Extract one for this model "
                "(deshift extract) or point the alias to another set"
            )

    def to_bytes(self) -> bytes:
        """A safetensors file; equal content gives equal bytes."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        manifest = self.manifest.as_dict()
        header = {
            "format": _FORMAT,
            "manifest": manifest,
            "content_sha256": _content_digest(manifest, tensors),
        }
        # One metadata entry: safetensors keeps several in no fixed order.
        return safetensors.torch.save(tensors, {"deshift": json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, expected_id: str | None = None) -> "ShiftVectors":
        """Parse and verify a file's bytes. Raises VectorError, saying what is wrong.

        A digest inside covers manifest and tensors, so damage is noticed without `expected_id`
        too; with it, another intact file is also refused.
        """
        found = hashlib.sha256(data).hexdigest()
        if expected_id is not None and found != expected_id:
            raise VectorError(
                f"vector set {expected_id[:12]}: its bytes have the digest {found[:12]}; the file "
                "is damaged or another one"
            )
        header = _header(data)
        manifest = Manifest.from_dict(header["manifest"])
        tensors = _load_tensors(data)
        if _content_digest(manifest.as_dict(), tensors) != header["content_sha256"]:
            raise VectorError("the content does not have the digest in its header: damaged")
        missing = {"mean", "hidden_norm", "consistency"} - tensors.keys()
        unknown = tensors.keys() - {field.name for field in fields(cls)}
        if missing or unknown:
            names = ", ".join(sorted(missing or unknown))
            raise VectorError(f"{'missing' if missing else 'unknown'} tensors: {names}")
        vectors = cls(manifest=manifest, **tensors)
        vectors.__dict__["id"] = found
        return vectors

    def save(self, path: Path) -> None:
        """Write the file, in one step as far as readers can see."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(self.to_bytes())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, expected_id: str | None = None) -> "ShiftVectors":
        """Read and verify a file. Raises VectorError naming the path."""
        try:
            return cls.from_bytes(path.read_bytes(), expected_id)
        except OSError as error:
            raise VectorError(f"{path}: {error.strerror or error}") from error
        except VectorError as error:
            raise VectorError(f"{path}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in named.items() if k != "manifest" and v is not None}


_DECISIVE = {
    "weights_digest": "weights",
    "quantisation": "quantisation",
    "processor_digest": "processor",
    "chat_template_digest": "chat template",
    "num_layers": "layers",
    "hidden_size": "hidden size",
}


def _header(data: bytes) -> dict[str, Any]:
    """The `deshift` entry of a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise VectorError("not a safetensors file, or a truncated one")
    try:
        header = json.loads(data[8 : 8 + length])
        values = json.loads(header["__metadata__"]["deshift"])
        format_, manifest, digest = values["format"], values["manifest"], values["content_sha256"]
    except (ValueError, RecursionError) as error:
        raise VectorError("not a safetensors file: its header is not JSON") from error
    except (KeyError, TypeError) as error:
        raise VectorError("a safetensors file, but not of shift vectors: no manifest") from error
    if format_ != _FORMAT:
        raise VectorError(f"format {format_!r}; this version reads {_FORMAT!r}")
    return {"manifest": manifest, "content_sha256": digest}


def _load_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise VectorError(f"not a readable safetensors file: {error}") from error


def _content_digest(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise VectorError(f"{name} is {tensor.dtype} on {tensor.device}, not float32 on the CPU")
    if tuple(tensor.shape) != shape or 0 in shape:
        raise VectorError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
    finite = tensor.isfinite()
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0, 0])
        raise VectorError(f"{name} holds NaN or infinity, first in layer {layer}")


def _checked(values: Any, kind: type, where: str) -> dict[str, Any]:
    """`values` if it is an object with exactly the fields of the dataclass `kind`, each typed."""
    if not isinstance(values, dict):
        raise VectorError(f"{where} is not an object")
    names = {field.name: field.type for field in fields(kind)}
    missing, unknown = names.keys() - values.keys(), values.keys() - names.keys()
    if missing or unknown:
        what = "lacks the field" if missing else "has the unknown field"
        raise VectorError(f"{where} {what} {', '.join(sorted(missing or unknown))}")
    for name, type_ in names.items():
        allowed = _JSON_TYPES.get(type_)
        if allowed is not None and type(values[name]) not in allowed:
            raise VectorError(f"{where}.{name} is {values[name]!r}")
    return values


_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    str | None: (str, type(None)),
}


def _name(identity: ModelIdentity) -> str:
    revision = f"@{identity.revision[:12]}" if identity.revision else ""
    return f"{identity.model_id}{revision}"


def _short(value: Any) -> str:
    """A digest by its first 12 digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
