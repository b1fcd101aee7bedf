"""Planning again over an older plan: what the new plan does not define is kept, as in nnU-Net."""

from dataclasses import replace
from pathlib import Path

from medmamba.errors import PlanError
from medmamba.plans.nnunet_schema import load_plan
from medmamba.plans.plan import Plan, Reason


def with_kept_configurations(plan: Plan, path: Path) -> Plan:
    """Add the configurations of the plan file at ``path`` that ``plan`` lacks, with a reason each.

    A file that is missing or of another version adds nothing.
    """
    if not path.is_file():
        return plan
    try:
        old = load_plan(path)
    except PlanError:
        return plan
    kept = {
        name: branch
        for name, branch in old.configurations.items()
        if name not in plan.configurations
    }
    reasons = tuple(
        Reason(topic=name, value="kept", why="written into this plan before; delete it if unwanted")
        for name in kept
    )
    return replace(
        plan,
        configurations={**plan.configurations, **kept},
        reasons=(*plan.reasons, *reasons),
    )
