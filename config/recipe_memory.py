# As little memory as there is: each loop computed anew in the backward pass, logits of 256 tokens
# at a time, weights in bfloat16 with float32 masters.
# python train.py config/recipe_memory.py
# Loss to expect: 1.725 on validation at 4 loops (1.737 in float32; seeds are as far apart).

from config.recipe_fixed import *

out_dir = "out-recipe-memory"
recompute = "loop"
loss_chunk = 256
param_dtype = "bfloat16"
