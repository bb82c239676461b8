"""What the Triton kernels share: device functions, the scan over time, and how a kernel is started or compiled."""
