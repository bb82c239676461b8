"""Files on servers: HTTP, object stores, downloads, and the cache on the local disk.

It imports datamodules.files, the index of a tar and base.
"""
