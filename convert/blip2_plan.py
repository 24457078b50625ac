"""Plans the build of a BLIP-2 model, as build_plan.py does for MiniGPT-4."""

from convert.blip2_stage1 import plan_stage1
from convert.blip2_stage2 import plan_stage2
from convert.build_plan import BuildPlan, BuildRequest


def make_blip2_plan(request: BuildRequest) -> BuildPlan:
    """Open the inputs, derive the configuration, find a source for each parameter. UserError for files
    that are damaged, unknown, or do not belong together."""
    plan = plan_stage1 if request.variant == "blip2-qformer" else plan_stage2
    return plan(request)
