"""Bad samples: the exception for a bad sample, and a counter that all worker processes share.

It imports base alone.
"""

from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSample, BadSamples

__all__ = ["BadRecord", "BadSample", "BadSamples"]
