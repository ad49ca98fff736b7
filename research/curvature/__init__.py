"""curvature: second-order quantities and sharpness of quantized networks, each at a stated surface."""
