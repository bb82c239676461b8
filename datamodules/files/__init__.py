"""Files on local and network disks: images in folders, files read within bounds.

It imports base alone.
"""
