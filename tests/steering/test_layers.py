"""Finding the decoder layers, and not the vision tower's."""

import copy
from types import SimpleNamespace

import pytest
from torch import nn

from steering.errors import ModelError
from steering.layers import decoder_layers
from tests.tiny_models import TinyModel


def test_the_layers_are_the_language_models(tiny_model: TinyModel) -> None:
    layers = decoder_layers(tiny_model.model)
    assert len(layers) == tiny_model.model.config.get_text_config().num_hidden_layers
    body = tiny_model.model.model
    decoder = body.text_model if hasattr(body, "text_model") else body.language_model
    assert layers == list(decoder.layers)


def test_a_layer_count_that_differs_from_the_config_is_refused(tiny_llava: TinyModel) -> None:
    model = copy.deepcopy(tiny_llava.model)
    del model.get_decoder().layers[0]
    with pytest.raises(ModelError, match="2 decoder layers, but its config says 3"):
        decoder_layers(model)


@pytest.mark.parametrize("layers", [nn.ModuleList(), nn.Linear(1, 1), None])
def test_a_model_without_decoder_layers_is_refused(layers: nn.Module | None) -> None:
    """Renamed layers must not leave steering a silent no-op."""
    model = nn.Module()
    model.get_decoder = lambda: SimpleNamespace(layers=layers)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="no `layers` to steer"):
        decoder_layers(model)
    with pytest.raises(ModelError, match="no `layers` to steer"):
        decoder_layers(nn.Linear(1, 1))
