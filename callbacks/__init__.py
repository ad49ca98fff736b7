"""Training mechanics: one file per paper, each a ``research.learning.mechanic.Mechanic``."""
