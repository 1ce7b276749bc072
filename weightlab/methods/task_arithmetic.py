"""The weighted sum of the differences (arXiv 2212.04089)."""

from __future__ import annotations

from weightlab.methods._task_arithmetic import TaskArithmetic

METHOD = TaskArithmetic()
