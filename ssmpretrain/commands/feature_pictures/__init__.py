"""Pictures of frozen features: nearest neighbours, and principal components as colours; before and after a training.

It imports commands.shared, datamodules and everything below them, and no command.
"""
