# An exit gate, trained as Ouro's in its first stage: the expected loss less the entropy of where
# to stop.
# python train.py config/recipe_exit.py
# Loss to expect: 1.779 on validation at 4 loops (1.737 without); with the gate's exit at 0.5
# 1.767 after 3.25 loops.

from config.recipe_fixed import *

out_dir = "out-recipe-exit"
objective = "exit"
exit_gate = "state"
entropy_weight = 0.05
