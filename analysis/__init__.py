"""Analysis: scripts over run folders; ``python -m analysis.<script> key=value ...``."""
