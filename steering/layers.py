"""Where a model's decoder layers are. Does not load models and installs no hooks."""

from torch import nn

from steering.errors import ModelError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of the language model, in order; layer l returns h_l.

    Goes through `get_decoder()`, because a vision tower also has `layers`. Raises ModelError
    where there are none or their number differs from the configuration's.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    layers = getattr(decoder, "layers", None)
    name = type(model).__name__
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ModelError(f"{name}: get_decoder() has no `layers` to steer")
    expected = text_config(model).num_hidden_layers
    if len(layers) != expected:
        raise ModelError(f"{name}: {len(layers)} decoder layers, but its config says {expected}")
    return list(layers)


def text_config(model: nn.Module):  # type: ignore[no-untyped-def]  # transformers' own config type
    """The language model's part of the configuration."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
