"""Seeded task generators: a prompt of a wanted length in tokens, the answer, and how a reply is scored."""

from jaxtopk.evaluation.tasks.base import Sample as Sample
from jaxtopk.evaluation.tasks.base import Task as Task
from jaxtopk.evaluation.tasks.json_kv import JsonKeyValue as JsonKeyValue
from jaxtopk.evaluation.tasks.niah import NeedleInHaystack as NeedleInHaystack
