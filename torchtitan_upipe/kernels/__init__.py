"""Attention kernels behind one contract; see ``contract.py``."""
