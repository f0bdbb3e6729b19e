"""How long a step may wait for what others bring. vLLM steps as fast as it can meanwhile."""

from __future__ import annotations

# How long the connector may wait for news in a step. One that computes nothing has nobody to hold
# up, and vLLM steps as fast as it can while all its requests wait: on a machine with few cores that
# takes one from whoever brings what they wait for.
# Idle steps that hear nothing wait longer and longer; an answer ends the wait, a new request has to
# wait for its end.
STEP_WAIT_S = 0.001
IDLE_WAIT_S = 0.005
IDLE_WAIT_MAX_S = 0.02
