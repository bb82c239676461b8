"""ARM's encoder, the MambaMLP: model and its checkpoints.

It imports encoders.sequence, encoders.layers, encoders.masking, encoders.weights and Vim's mixer.
"""
