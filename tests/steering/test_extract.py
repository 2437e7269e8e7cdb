"""Extraction, against a prompt-by-prompt computation without hooks, batches or padding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from server.engine.families import family_of
from server.engine.inputs import InputBuilder
from steering.anchors import Anchor, AnchorSet
from steering.errors import PlanError, VectorError
from steering.extract import extract, last_hidden, prompt_inputs
from steering.hooks import Injection, steer
from steering.layers import decoder_layers
from steering.models import LoadedModel, identity_of
from steering.vectors import ShiftVectors
from tests.tiny_models import TinyModel

TEXTS = ("a", "How are you today?", "Why", "one two three four five six seven", "Tell me.", "no")
ANCHORS = AnchorSet(
    "few",
    tuple(Anchor(str(i), "harmful" if i % 2 else "harmless", text) for i, text in enumerate(TEXTS)),
)
SIZE = (48, 32)
WHITE = Image.new("RGB", SIZE, "white")


def loaded(tiny: TinyModel) -> LoadedModel:
    identity = identity_of(tiny.model, tiny.processor, model_id=tiny.name)
    return LoadedModel(tiny.model, tiny.processor, identity)


@pytest.fixture(scope="module")
def vectors(tiny_model: TinyModel) -> ShiftVectors:
    return extract(loaded(tiny_model), ANCHORS, image_size=SIZE, batch_size=2, basis_rank=2)


@pytest.fixture(scope="module")
def states(tiny_model: TinyModel) -> Callable[[bool], Tensor]:
    """(N, L, D) of the last token, with or without the image: one prompt at a time, from
    transformers' own hidden states of a model whose final norm is taken away."""
    model = copy.deepcopy(tiny_model.model)
    model.get_decoder().norm = nn.Identity()

    def one(text: str, image: Image.Image | None) -> Tensor:
        parts: list[dict[str, Any]] = [{"type": "image"}] if image else []
        parts.append({"type": "text", "text": text})
        prompt = tiny_model.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        inputs = tiny_model.processor(
            text=prompt, images=[image] if image else None, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        return torch.stack([hidden[0, -1] for hidden in output.hidden_states[1:]])

    both = [torch.stack([one(text, image) for text in TEXTS]) for image in (None, WHITE)]
    return lambda image: both[image]


def assert_close(actual: Tensor | None, expected: Tensor) -> None:
    """Within 1e-5 of the whole tensor's norm."""
    assert actual is not None and actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_the_mean_is_image_minus_text_at_the_last_prompt_token(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    assert_close(vectors.mean, (states(True) - states(False)).mean(dim=0))


def test_the_hidden_norm_is_the_median_over_prompts_with_the_image(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    assert_close(vectors.hidden_norm, states(True).norm(dim=-1).median(dim=0).values)


def test_the_consistency_is_the_mean_cosine_over_pairs_of_prompts(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    shifts = states(True) - states(False)
    pairs = [(i, j) for i in range(len(TEXTS)) for j in range(i)]
    cosines = [torch.cosine_similarity(shifts[i], shifts[j], dim=-1) for i, j in pairs]
    assert torch.allclose(vectors.consistency, torch.stack(cosines).mean(dim=0), atol=1e-5)


def test_the_refusal_direction_is_harmful_minus_harmless_text(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    text = states(False)
    assert_close(vectors.refusal_direction, text[1::2].mean(dim=0) - text[::2].mean(dim=0))


def test_the_text_mean_is_that_of_all_prompts_without_the_image(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    assert_close(vectors.text_mean, states(False).mean(dim=0))


def test_the_basis_holds_the_leading_eigenvectors_of_the_uncentred_shifts(
    vectors: ShiftVectors, states: Callable[[bool], Tensor]
) -> None:
    assert vectors.basis is not None and vectors.singular_values is not None
    shifts = (states(True) - states(False)).double()
    for layer in range(vectors.num_layers):
        scatter = shifts[:, layer].T @ shifts[:, layer]
        eigenvalues = torch.linalg.eigvalsh(scatter).flip(0)[:2]
        basis = vectors.basis[layer].double()
        assert torch.allclose(vectors.singular_values[layer].double() ** 2, eigenvalues, rtol=1e-4)
        assert torch.allclose(basis @ basis.T, torch.eye(2).double(), atol=1e-5)
        residual = basis @ scatter - eigenvalues[:, None] * basis
        assert residual.norm() < 1e-3 * eigenvalues[0]
        assert (basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_batch_size_does_not_show(
    tiny_model: TinyModel, vectors: ShiftVectors, batch_size: int
) -> None:
    other = extract(
        loaded(tiny_model), ANCHORS, image_size=SIZE, batch_size=batch_size, basis_rank=2
    )
    singles = ("mean", "hidden_norm", "consistency", "singular_values")
    for name in (*singles, "refusal_direction", "text_mean"):
        assert_close(getattr(other, name), getattr(vectors, name))


@pytest.mark.parametrize("image", [WHITE, None])
def test_padding_does_not_show(tiny_model: TinyModel, image: Image.Image | None) -> None:
    model, processor = tiny_model.model, tiny_model.processor
    together = last_hidden(model, processor, TEXTS, image)
    for row, text in enumerate(TEXTS):
        assert_close(together[:, row], last_hidden(model, processor, [text], image)[:, 0])


def test_subtracting_a_prompts_own_shift_gives_its_text_only_state_back(
    tiny_model: TinyModel,
) -> None:
    """The sign: the corrupted image as the image itself, alpha 1, one layer steered at a time."""
    model, processor = tiny_model.model, tiny_model.processor
    text_only = last_hidden(model, processor, TEXTS[1:2], None)
    shift = last_hidden(model, processor, TEXTS[1:2], WHITE) - text_only
    layers = decoder_layers(model)
    for layer in range(len(layers)):
        with steer(layers) as injector:
            table = torch.zeros_like(shift)
            table[layer] = shift[layer]
            injector.injection = Injection(table, token=-1)
            steered = last_hidden(model, processor, TEXTS[1:2], WHITE)
        assert_close(steered[layer], text_only[layer])


def test_extraction_and_serving_build_the_same_tokens(tiny_model: TinyModel) -> None:
    builder = InputBuilder(family_of(tiny_model.model), tiny_model.model, tiny_model.processor)
    for image in (WHITE, None):
        parts: list[dict[str, Any]] = [{"type": "image"}] if image else []
        parts.append({"type": "text", "text": TEXTS[1]})
        served = builder.build([{"role": "user", "content": parts}], [image] if image else [])
        inputs = prompt_inputs(tiny_model.model, tiny_model.processor, TEXTS[1:2], image)
        assert tuple(inputs["input_ids"][0].tolist()) == served.prompt.token_ids


def test_the_manifest_says_where_the_vectors_come_from(
    tiny_model: TinyModel, vectors: ShiftVectors
) -> None:
    manifest = vectors.manifest
    assert manifest.model == loaded(tiny_model).identity
    assert (manifest.corruption, manifest.image_size) == ("blank", "48x32")
    assert (manifest.anchor_set, manifest.num_anchors) == ("few", 6)
    assert manifest.anchor_set_digest == ANCHORS.digest
    assert dict(manifest.versions)["torch"] == torch.__version__
    vectors.check(loaded(tiny_model).identity)


def test_the_corruption_kind_changes_the_shift(tiny_llava: TinyModel) -> None:
    kinds = [extract(loaded(tiny_llava), ANCHORS, corruption=k) for k in ("blank", "gray", "noise")]
    assert len({vectors.id for vectors in kinds}) == 3
    assert kinds[2].mean.equal(extract(loaded(tiny_llava), ANCHORS, corruption="noise").mean)


def test_progress_counts_every_anchor_once(tiny_llava: TinyModel) -> None:
    done: list[int] = []
    extract(loaded(tiny_llava), ANCHORS, batch_size=4, on_progress=done.append)
    assert done == [4, 2]


def test_without_a_rank_there_is_no_basis_and_with_one_label_no_refusal_direction(
    tiny_llava: TinyModel,
) -> None:
    one_label = AnchorSet("one", (ANCHORS.anchors[1], ANCHORS.anchors[3]))
    vectors = extract(loaded(tiny_llava), one_label)
    assert (vectors.basis, vectors.singular_values) == (None, None)
    assert vectors.refusal_direction is None and vectors.text_mean is not None


def test_settings_that_cannot_be_are_refused(tiny_llava: TinyModel) -> None:
    with pytest.raises(PlanError, match="mean-colour needs"):
        extract(loaded(tiny_llava), ANCHORS, corruption="mean-colour")
    for settings in ({"batch_size": 0}, {"image_size": (0, 4)}, {"basis_rank": 7}):
        with pytest.raises(PlanError, match="must be above zero"):
            extract(loaded(tiny_llava), ANCHORS, **settings)


def test_a_model_that_overflows_gives_no_vectors(tiny_llava: TinyModel) -> None:
    model = copy.deepcopy(tiny_llava.model)
    model.get_decoder().layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    broken = LoadedModel(model, tiny_llava.processor, loaded(tiny_llava).identity)
    with pytest.raises(VectorError, match="NaN or infinity, first in layer 1"):
        extract(broken, ANCHORS)
