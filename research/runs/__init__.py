"""Run folders: records, checkpoints, exact resume and loggers of one run."""
