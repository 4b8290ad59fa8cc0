"""Readers of published suites from local folders, with the metrics that each suite defines."""

from jaxtopk.evaluation.suites.opening import SUITES as SUITES
from jaxtopk.evaluation.suites.opening import not_run as not_run
from jaxtopk.evaluation.suites.opening import open_suite as open_suite
