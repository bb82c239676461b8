"""Parts that several commands share: images to evaluate, frozen encoders, towers, files, options.

It imports objectives, datamodules and everything below them, and no command.
"""
