"""How webdataset reads the name of a tar's member, and nothing else of it: no shell, and nothing unpickled."""

import os

# Read by webdataset when it is imported: its openers then start no shell and its decoders unpickle nothing. Neither is
# called here; this keeps the door closed for whatever else imports webdataset in this process.
os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext

__all__ = ["base_plus_ext"]
