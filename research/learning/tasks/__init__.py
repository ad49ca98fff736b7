"""Tasks: what a batch is, what the network makes of it, and how well."""

from research.learning.tasks.base import Task
from research.learning.tasks.classification import Classification

__all__ = ["Classification", "Task"]
