"""Self-supervised pretraining for vision state-space models."""

__version__ = "0.1.0"
