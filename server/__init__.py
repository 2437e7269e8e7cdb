"""The product: an OpenAI-compatible server around the engine and the steering method."""
