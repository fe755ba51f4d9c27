"""Tasks of the real demo and of its study, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from weft_training.demo.real.figures import FIGURES
from weft_training.demo.real.mails import MAILS
from weft_training.demo.real.task import RealTask
from weft_training.demo.real.tickets import TICKETS

TASKS: Mapping[str, RealTask] = MappingProxyType({task.name: task for task in (MAILS, TICKETS, FIGURES)})
