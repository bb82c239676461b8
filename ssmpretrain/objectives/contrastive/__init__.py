"""Contrastive language-image pretraining: CLIP, MAECLIP, text towers, open_clip's formats, zero-shot classifiers.

It imports encoders, training, evaluation, base and objectives.masked. Only open_clip_adapter.py imports open_clip.
"""
