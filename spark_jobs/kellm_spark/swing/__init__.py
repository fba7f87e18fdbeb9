"""SWING similarity of items or users from who interacted with what (Yang et al. 2020; KELLMRec Eq. 1-2).

`swing_pairs` is the function to call; `plan_swing` tells what was counted on the way. `parameters` has the formula,
`interactions` checks the input, `csr` and `blocks` are the two ways to spread the work, `kernel` is the arithmetic.
"""

from kellm_spark.swing.parameters import PRESETS, Side, SwingOptions, SwingParameters, swing_parameters
from kellm_spark.swing.plan import SwingPlan, plan_swing, swing_pairs

__all__ = [
    "PRESETS",
    "Side",
    "SwingOptions",
    "SwingParameters",
    "SwingPlan",
    "plan_swing",
    "swing_pairs",
    "swing_parameters",
]
