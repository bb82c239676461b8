"""An operation from outside the package: one folder, and no edit anywhere else. Tests add it as a user would."""

from decay_scan.api import decay_scan
from decay_scan.reference import decay_scan_reference

__all__ = ["decay_scan", "decay_scan_reference"]
