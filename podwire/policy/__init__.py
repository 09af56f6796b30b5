"""Policy objects, Pods and Namespaces in, an immutable PolicyTable with its evaluator out. Pure.

`PolicyCompiler.update` makes tables, `PolicyTable.judge` says what holds for a packet and why;
`explain`, `lint`, `diff` and `matrix` answer people's questions from the same two.
"""

from podwire.policy.compiler import PolicyCompiler
from podwire.policy.hosts import Attachment
from podwire.policy.judge import Decision, Judgement, Packet, Why
from podwire.policy.model import Direction, PolicyRef, Verdict
from podwire.policy.table import Endpoint, PolicyTable

__all__ = [
    "Attachment",
    "Decision",
    "Direction",
    "Endpoint",
    "Judgement",
    "Packet",
    "PolicyCompiler",
    "PolicyRef",
    "PolicyTable",
    "Verdict",
    "Why",
]
