"""TorchTitan's models with their attention handed to a context-parallel method."""
