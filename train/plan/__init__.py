"""What a run will take, before the GPUs for it are rented: memory, traffic, time, yes or no.

    python -m train plan --preset deepseek-v3.2-exp --stage sparse --devices 256

compiles the real train step for GPUs that are not there and reads the program.
"""

from train.plan.options import PlanOptions
from train.plan.plain import to_json
from train.plan.report import Report, make

__all__ = ["PlanOptions", "Report", "make", "to_json"]
