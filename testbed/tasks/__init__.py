"""Questions and scores: what is asked of the model, and how well it answered.

A task's prompt is ``prefix · context · question``, and the model continues with the answer. Nothing here imports torch.
"""

from __future__ import annotations

from testbed.tasks.task import Example, Task, TaskDescription, describe, make_task, parse_task

__all__ = ["Example", "Task", "TaskDescription", "describe", "make_task", "parse_task"]
