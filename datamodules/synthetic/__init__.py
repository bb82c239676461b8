"""Images drawn here, without a download: handwritten digits on photographs, scenes of shapes with captions.

It imports the data modules and datamodules.shards.
"""
