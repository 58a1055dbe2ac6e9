"""Tasks to tokenised instances: the hub, local files, the built-in task."""

from rl_exit.data.batching import count_batches, length_sorted_batches, shuffled_batches
from rl_exit.data.instances import Instances
from rl_exit.data.registry import TaskInfo, list_tasks
from rl_exit.data.tasks import Task, TextSplit, load_task, tokenise

__all__ = [
    "Instances",
    "Task",
    "TaskInfo",
    "TextSplit",
    "count_batches",
    "length_sorted_batches",
    "list_tasks",
    "load_task",
    "shuffled_batches",
    "tokenise",
]
