"""Seeded task generators: a prompt of a wanted length in tokens, the answer, and how a reply is scored."""

from jaxtopk.evaluation.tasks.base import Sample as Sample
from jaxtopk.evaluation.tasks.base import Task as Task
from jaxtopk.evaluation.tasks.base import TokenSample as TokenSample
from jaxtopk.evaluation.tasks.base import TokenTask as TokenTask
from jaxtopk.evaluation.tasks.haystack import Haystack as Haystack
from jaxtopk.evaluation.tasks.json_kv import JsonKeyValue as JsonKeyValue
from jaxtopk.evaluation.tasks.niah import NeedleInHaystack as NeedleInHaystack
from jaxtopk.evaluation.tasks.registry import expand_names as expand_names
from jaxtopk.evaluation.tasks.registry import make_task as make_task
from jaxtopk.evaluation.tasks.registry import task_names as task_names
