"""Which policy a router has: its configuration names one."""

from __future__ import annotations

import random

from baton.core.config import RouterConfig
from baton.router.baselines import RULES, Ranked, RoundRobin
from baton.router.cost import CostPolicy
from baton.router.policy import Policy


def make_policy(config: RouterConfig, rng: random.Random) -> Policy:
    """The one that `router.policy` names; ties are broken by `rng`."""
    if config.policy == "cost":
        return CostPolicy(config, rng)
    if config.policy == "round_robin":
        return RoundRobin(config)
    prefill_rule, decode_rule = RULES[config.policy]
    return Ranked(config.policy, config, rng, prefill_rule, decode_rule)
