"""Parts that several commands share: images to evaluate, frozen encoders, towers, files, devices.

It imports objectives, datamodules and everything below them, and no command.
"""
