# Ouro's second stage: the gate alone, on the model that recipe_exit.py has trained.
# python train.py config/recipe_exit_gate.py
# Loss to expect: the model's own stays, 1.779 on validation; the gate's goes from 0.549 to 0.431.

from config.recipe_exit import *

out_dir = "out-recipe-exit-gate"
init_from = "out-recipe-exit"
objective = "exit_gate"
max_iters = 200
eval_interval = 200
