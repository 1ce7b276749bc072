"""The weighted mean of the differences, or with normalize=false their weighted sum (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from weightlab.methods._task_arithmetic import TaskArithmetic

METHOD = TaskArithmetic(normalize=True)
