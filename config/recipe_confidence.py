# A gate on the mean state of the tokens so far learns whether a loop already predicts what the
# last one will.
# python train.py config/recipe_confidence.py
# Loss to expect: 1.730 on validation at 4 loops (1.737 without).

from config.recipe_fixed import *

out_dir = "out-recipe-confidence"
objective = "confidence"
exit_gate = "mean_state"
