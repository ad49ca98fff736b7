"""Against oscillation of the codes: a meter, dampening and freezing (Nagel et al., ICML 2022, arXiv 2203.11086)."""

from callbacks.oscillation.dampening import OscillationDampening
from callbacks.oscillation.freezing import OscillationFreezing
from callbacks.oscillation.tracker import OscillationTracker

__all__ = ["OscillationDampening", "OscillationFreezing", "OscillationTracker"]
